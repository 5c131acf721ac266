-- Enters a file whose content is on disk already. The same id again replaces its record and keeps its place.
--
-- KEYS  1 tenants  hash: tenant -> record
--       2 files    hash: the tenant's file ids -> record
--       3 order    zset: the tenant's file ids, oldest first
--       4 counts   hash
--       5 owners   hash: file id -> tenant, of all tenants
-- ARGV  1 tenant   2 "1" if it needs a record   3 file id   4 record
-- Gives 1, or 0 when there is no such tenant.

if ARGV[2] == "1" and redis.call("HEXISTS", KEYS[1], ARGV[1]) == 0 then
  return 0
end
if redis.call("HSET", KEYS[2], ARGV[3], ARGV[4]) == 1 then
  redis.call("ZADD", KEYS[3], redis.call("HINCRBY", KEYS[4], "serial", 1), ARGV[3])
  redis.call("HSET", KEYS[5], ARGV[3], ARGV[1])
end
return 1
