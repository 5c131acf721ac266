-- Ends a claim: remembers the answer, or forgets the claim so that the request can be sent again.
--
-- KEYS  1 answer   string: what is remembered
--       2 answers  zset: names of the tenant's remembered answers, by expiry
-- ARGV  1 the claim   2 the answer ("" to forget)   3 how long to remember it, seconds   4 now, Unix seconds
-- Gives 1, or 0 when the claim has expired or was taken by another.

if redis.call("GET", KEYS[1]) ~= ARGV[1] then
  return 0
end
if ARGV[2] == "" then
  redis.call("DEL", KEYS[1])
  redis.call("ZREM", KEYS[2], KEYS[1])
else
  redis.call("SET", KEYS[1], ARGV[2], "EX", ARGV[3])
  redis.call("ZADD", KEYS[2], ARGV[4] + ARGV[3], KEYS[1])
end
return 1
