-- Points an alias of a delta to a version.
--
-- KEYS  1 delta   hash: the delta itself (fields in keys.py)
-- ARGV  1 alias   2 version
-- Gives 1, or 0 when there is no such version.

if redis.call("HEXISTS", KEYS[1], "v:" .. ARGV[2]) == 0 then
  return 0
end
redis.call("HSET", KEYS[1], "a:" .. ARGV[1], ARGV[2])
return 1
