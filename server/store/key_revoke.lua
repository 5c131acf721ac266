-- Removes an API key of a tenant.
--
-- KEYS  1 api keys  hash: HMAC -> record, of all tenants
--       2 own keys  hash: the tenant's key ids -> HMAC
-- ARGV  1 key id
-- Gives 1, or 0 when the tenant has no such key.

local hmac = redis.call("HGET", KEYS[2], ARGV[1])
if not hmac then
  return 0
end
redis.call("HDEL", KEYS[1], hmac)
redis.call("HDEL", KEYS[2], ARGV[1])
return 1
