-- Makes a tenant.
--
-- KEYS  1 tenants  hash: tenant -> record
--       2 order    zset: tenants, oldest first
--       3 counts   hash
-- ARGV  1 tenant   2 its record
-- Gives 1, or 0 when it exists.

if redis.call("HSETNX", KEYS[1], ARGV[1], ARGV[2]) == 0 then
  return 0
end
redis.call("ZADD", KEYS[2], redis.call("HINCRBY", KEYS[3], "serial", 1), ARGV[1])
return 1
