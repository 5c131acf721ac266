-- Enters a tuning job, in the state `validating_files` and leased by its maker.
--
-- KEYS  1..8 the job's (job_common.lua)   9 tenants  hash: tenant -> record   10 counts  hash
--       11 jobs  zset: the tenant's job ids, oldest first
-- ARGV  1 id   2 tenant   3 "1" if it needs a record   4 what never changes, JSON   5 most jobs that have not ended ("" for
--       no limit)   6 the lease's end   7 who holds it   8 event
-- Gives 1 when made, 0 when the limit is reached, or nothing when there is no such tenant.

local keys = job_keys(1)
local id, tenant = ARGV[1], ARGV[2]
if ARGV[3] == "1" and redis.call("HEXISTS", KEYS[9], tenant) == 0 then
  return false
end
if ARGV[5] ~= "" and redis.call("SCARD", keys.active) >= tonumber(ARGV[5]) then
  return 0
end
local serial = redis.call("HINCRBY", KEYS[10], "serial", 1)
redis.call("HSET", keys.job, "tenant", tenant, "serial", serial, "status", "validating_files", "token", 1,
  "owner", ARGV[7], "wish", "", "events", 0, "fixed", ARGV[4])
redis.call("ZADD", KEYS[11], serial, id)
redis.call("SADD", keys.active, id)
redis.call("HINCRBY", keys.states, "validating_files", 1)
redis.call("ZADD", keys.leases, ARGV[6], id)
job_note(keys, ARGV[8])
return 1
