-- Adds a version of a delta, or finds the one with the same digest. Where a tuning job made it, the job succeeds with it.
--
-- KEYS  1 tenants   hash: tenant -> record
--       2 names     zset: the tenant's delta names
--       3 delta     hash: the delta itself (fields in keys.py)
--       4 digests   hash: digest -> number of versions
--       5 counts    hash
--       6 quarantined  hash: digest -> reason
--       7..14 the job's (job_common.lua), if there is one
-- ARGV  1 tenant ("" if it needs no record)   2 name   3 digest   4 JSON of what never changes
--       5 visibility: "public", "private", or "" (private if new, else as it is)   6 "1": move `live` here
--       of the job: 7 id   8 tenant   9 fencing token   10 now   11 progress   12 result files   13 event
-- Gives {created 0|1, version, JSON, public 0|1, reason of its quarantine or nothing}, or nothing when there is no such tenant,
-- or {-1} when the job's token is stale.

local keys = #KEYS > 6 and job_keys(7)
if keys and not job_held(keys, ARGV[7], ARGV[9]) then
  return {-1}
end
if ARGV[1] ~= "" and redis.call("HEXISTS", KEYS[1], ARGV[1]) == 0 then
  return false
end

local created = 0
local version = redis.call("HGET", KEYS[3], "d:" .. ARGV[3])
if not version then
  created = 1
  version = tostring(redis.call("HINCRBY", KEYS[3], "n", 1))
  redis.call("HSET", KEYS[3], "v:" .. version, ARGV[4], "g:" .. version, ARGV[3], "d:" .. ARGV[3], version)
  redis.call("HINCRBY", KEYS[4], ARGV[3], 1)
  redis.call("HINCRBY", KEYS[5], "versions", 1)
  if not redis.call("ZSCORE", KEYS[2], ARGV[2]) then
    redis.call("ZADD", KEYS[2], redis.call("HINCRBY", KEYS[5], "serial", 1), ARGV[2])
    redis.call("HINCRBY", KEYS[5], "names", 1)
  end
end

if ARGV[5] == "public" then
  redis.call("HSET", KEYS[3], "p:" .. version, "1")
elseif ARGV[5] == "private" then
  redis.call("HDEL", KEYS[3], "p:" .. version)
end
if ARGV[6] == "1" or redis.call("HEXISTS", KEYS[3], "a:live") == 0 then
  redis.call("HSET", KEYS[3], "a:live", version)
end

if keys then
  redis.call("HSET", keys.job, "model", ARGV[2], "progress", ARGV[11], "results", ARGV[12])
  job_note(keys, ARGV[13])
  job_move(keys, ARGV[7], ARGV[8], "succeeded", ARGV[10])
end

return {
  created,
  tonumber(version),
  redis.call("HGET", KEYS[3], "v:" .. version),
  redis.call("HEXISTS", KEYS[3], "p:" .. version),
  redis.call("HGET", KEYS[6], ARGV[3]),
}
