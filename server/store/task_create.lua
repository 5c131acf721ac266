-- Makes a task, or finds the one with that name.
--
-- KEYS  1 tenants  hash: tenant -> record
--       2 tasks    hash: the tenant's task names -> record
--       3 order    zset: the tenant's task names, oldest first
--       4 counts   hash
-- ARGV  1 tenant ("" if it needs no record)   2 name   3 record
-- Gives {1} when made, {0, record} when it exists, or nothing when there is no such tenant.

if ARGV[1] ~= "" and redis.call("HEXISTS", KEYS[1], ARGV[1]) == 0 then
  return false
end
if redis.call("HSETNX", KEYS[2], ARGV[2], ARGV[3]) == 0 then
  return {0, redis.call("HGET", KEYS[2], ARGV[2])}
end
redis.call("ZADD", KEYS[3], redis.call("HINCRBY", KEYS[4], "serial", 1), ARGV[2])
return {1}
