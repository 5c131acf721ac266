-- What a tenant asks of its tuning job.
--
-- KEYS  1..8 the job's (job_common.lua)
-- ARGV  1 id   2 tenant   3 "cancel", "pause" or "resume"   4 now   5 event
-- Gives 1, 0 when the job's state does not allow it, or nothing when the tenant has no such job.

local keys = job_keys(1)
local id, tenant, ask = ARGV[1], ARGV[2], ARGV[3]
if redis.call("HGET", keys.job, "tenant") ~= tenant then
  return false
end
local status, wish = unpack(redis.call("HMGET", keys.job, "status", "wish"))
if ask == "cancel" and not ENDED[status] then
  redis.call("HINCRBY", keys.job, "token", 1) -- whoever works on it can write no more
  job_move(keys, id, tenant, "cancelled", ARGV[4])
elseif ask == "pause" and status == "queued" then
  job_move(keys, id, tenant, "paused", ARGV[4])
elseif ask == "pause" and status == "running" and wish == "" then
  redis.call("HSET", keys.job, "wish", "pause") -- its worker makes a checkpoint first
elseif ask == "resume" and status == "paused" then
  job_move(keys, id, tenant, "queued", ARGV[4])
elseif ask == "resume" and wish == "pause" then
  redis.call("HSET", keys.job, "wish", "")
else
  return 0
end
job_note(keys, ARGV[5])
return 1
