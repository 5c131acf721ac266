-- Removes a file's record.
--
-- KEYS  1 files   hash: the tenant's file ids -> record
--       2 order   zset: the tenant's file ids, oldest first
--       3 owners  hash: file id -> tenant, of all tenants
-- ARGV  1 file id
-- Gives 1, or 0 when the tenant has no such file.

if redis.call("HDEL", KEYS[1], ARGV[1]) == 0 then
  return 0
end
redis.call("ZREM", KEYS[2], ARGV[1])
redis.call("HDEL", KEYS[3], ARGV[1])
return 1
