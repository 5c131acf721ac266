-- Reads a tenant's API keys.
--
-- KEYS  1 tenants   hash: tenant -> record
--       2 api keys  hash: HMAC -> record, of all tenants
--       3 own keys  hash: the tenant's key ids -> HMAC
-- ARGV  1 tenant
-- Gives the records in no order, or nothing when there is no such tenant.

if redis.call("HEXISTS", KEYS[1], ARGV[1]) == 0 then
  return false
end
local records = {}
for _, hmac in ipairs(redis.call("HVALS", KEYS[3])) do
  records[#records + 1] = redis.call("HGET", KEYS[2], hmac)
end
return records
