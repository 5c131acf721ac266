-- Replaces a tenant's record, unless another change came first.
--
-- KEYS  1 tenants  hash: tenant -> record
-- ARGV  1 tenant   2 the record as it was read   3 the new one
-- Gives 1, or 0 when the record is not 2 any more.

if redis.call("HGET", KEYS[1], ARGV[1]) ~= ARGV[2] then
  return 0
end
redis.call("HSET", KEYS[1], ARGV[1], ARGV[3])
return 1
