-- Forgets a tuning job.
--
-- KEYS  1..8 the job's (job_common.lua)   9 jobs  zset: the tenant's job ids
-- ARGV  1 id   2 tenant   3 fencing token: its holder may forget one that is not queued yet ("" for one that has ended)
-- Gives 1, 0 when the job's state does not allow it, or nothing when the tenant has no such job or the token is stale.

local keys = job_keys(1)
local id = ARGV[1]
if redis.call("HGET", keys.job, "tenant") ~= ARGV[2] or (ARGV[3] ~= "" and not job_held(keys, id, ARGV[3])) then
  return false
end
local status = redis.call("HGET", keys.job, "status")
if not (ENDED[status] or (ARGV[3] ~= "" and status == "validating_files")) then
  return 0
end
redis.call("HINCRBY", keys.states, status, -1)
redis.call("ZREM", keys.leases, id)
redis.call("SREM", keys.active, id)
redis.call("ZREM", KEYS[9], id)
redis.call("DEL", keys.job, keys.events, keys.checkpoints)
return 1
