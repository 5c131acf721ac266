-- Pins one version of a delta to a tier, or lets it go.
--
-- KEYS  1 delta  hash: the delta itself (fields in keys.py)
--       2 pins   hash: TENANT/NAME@VERSION -> TIER:DIGEST
-- ARGV  1 TENANT/NAME@VERSION   2 version   3 tier ("" for none)
-- Gives 1, or 0 when there is no such version.

local digest = redis.call("HGET", KEYS[1], "g:" .. ARGV[2])
if not digest then
  return 0
end
if ARGV[3] == "" then
  redis.call("HDEL", KEYS[2], ARGV[1])
else
  redis.call("HSET", KEYS[2], ARGV[1], ARGV[3] .. ":" .. digest)
end
return 1
