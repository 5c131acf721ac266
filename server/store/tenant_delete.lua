-- Deletes a tenant with everything it owns.
--
-- KEYS  1 tenants      hash: tenant -> record
--       2 order        zset: tenants, oldest first
--       3 api keys     hash: HMAC -> record, of all tenants
--       4 own keys     hash: the tenant's key ids -> HMAC
--       5 names        zset: the tenant's delta names
--       6 digests      hash: digest -> number of versions
--       7 quarantined  hash: digest -> reason
--       8 counts       hash
--       9 answers      zset: names of the tenant's remembered answers
--      10 tasks        hash: the tenant's tasks
--      11 their order  zset
--      12 pins         hash: TENANT/NAME@VERSION -> TIER:DIGEST, of all tenants
--      13 files        hash: the tenant's file ids
--      14 their order  zset
--      15 owners       hash: file id -> tenant, of all tenants
--      16 jobs         zset: the tenant's tuning job ids
--      17 states       hash: state -> how many jobs
--      18 leases       zset: job id, by its lease's end
--      19 ring         list: tenants with queued jobs
--      20 queue        zset: the tenant's queued jobs
--      21 active       set: its jobs that have not ended
-- ARGV  1 tenant   2 what its delta hashes' names begin with (the rest is the delta's name; they depend on 5)
--       3 what job hashes' names begin with (the rest is the job's id; they depend on 16)
-- Gives the digests that no version of any tenant refers to any more, or nothing when there is no such tenant.

if redis.call("HDEL", KEYS[1], ARGV[1]) == 0 then
  return false
end
redis.call("ZREM", KEYS[2], ARGV[1])

for _, hmac in ipairs(redis.call("HVALS", KEYS[4])) do
  redis.call("HDEL", KEYS[3], hmac)
end
for _, answer in ipairs(redis.call("ZRANGE", KEYS[9], 0, -1)) do
  redis.call("DEL", answer)
end

local dropped = {}
local names = redis.call("ZRANGE", KEYS[5], 0, -1)
for _, name in ipairs(names) do
  local fields = redis.call("HGETALL", ARGV[2] .. name)
  for i = 1, #fields, 2 do
    if string.sub(fields[i], 1, 2) == "g:" then
      local digest = fields[i + 1]
      redis.call("HDEL", KEYS[12], ARGV[1] .. "/" .. name .. "@" .. string.sub(fields[i], 3))
      redis.call("HINCRBY", KEYS[8], "versions", -1)
      if redis.call("HINCRBY", KEYS[6], digest, -1) == 0 then
        redis.call("HDEL", KEYS[6], digest)
        redis.call("HDEL", KEYS[7], digest)
        dropped[#dropped + 1] = digest
      end
    end
  end
  redis.call("DEL", ARGV[2] .. name)
end
redis.call("HINCRBY", KEYS[8], "names", -#names)
for _, id in ipairs(redis.call("HKEYS", KEYS[13])) do
  redis.call("HDEL", KEYS[15], id)
end
for _, id in ipairs(redis.call("ZRANGE", KEYS[16], 0, -1)) do
  local job = ARGV[3] .. id
  redis.call("HINCRBY", KEYS[17], redis.call("HGET", job, "status"), -1)
  redis.call("ZREM", KEYS[18], id)
  redis.call("DEL", job, job .. ":events", job .. ":checkpoints")
end
redis.call("LREM", KEYS[19], 0, ARGV[1])
redis.call("DEL", KEYS[4], KEYS[5], KEYS[9], KEYS[10], KEYS[11], KEYS[13], KEYS[14], KEYS[16], KEYS[20], KEYS[21])
return dropped
