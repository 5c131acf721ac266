-- Claims an idempotency key for a request that begins, or reads what is known of it.
--
-- KEYS  1 answer   string: what is remembered
--       2 answers  zset: names of the tenant's remembered answers, by expiry
-- ARGV  1 the claim   2 how long the claim lasts, seconds   3 now, Unix seconds
-- Gives nothing when the caller has it now, else what is remembered.

local known = redis.call("GET", KEYS[1])
if known then
  return known
end
redis.call("SET", KEYS[1], ARGV[1], "EX", ARGV[2])
redis.call("ZREMRANGEBYSCORE", KEYS[2], "-inf", ARGV[3])
redis.call("ZADD", KEYS[2], ARGV[3] + ARGV[2], KEYS[1])
return false
