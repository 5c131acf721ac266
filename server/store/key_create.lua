-- Stores an API key of a tenant.
--
-- KEYS  1 tenants   hash: tenant -> record
--       2 api keys  hash: HMAC -> record, of all tenants
--       3 own keys  hash: the tenant's key ids -> HMAC
-- ARGV  1 tenant   2 key id   3 HMAC   4 record
-- Gives 1, or 0 when there is no such tenant.

if redis.call("HEXISTS", KEYS[1], ARGV[1]) == 0 then
  return 0
end
redis.call("HSET", KEYS[2], ARGV[3], ARGV[4])
redis.call("HSET", KEYS[3], ARGV[2], ARGV[3])
return 1
