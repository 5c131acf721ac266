-- Reads a page of a tenant's deltas, oldest name first: of each, the version that `live` points to.
--
-- KEYS  1 names        zset: the tenant's delta names
--       2 quarantined  hash: digest -> reason
-- ARGV  1 what the delta hashes' names begin with (the rest is the delta's name; they depend on what is read)
--       2 the name after which to begin ("" for the first page)   3 how many
-- Gives {more 0|1, {name, version, JSON, public 0|1, reason of its quarantine or nothing} ...}, or nothing when name 2 is not there.

local first = 0
if ARGV[2] ~= "" then
  local rank = redis.call("ZRANK", KEYS[1], ARGV[2])
  if not rank then
    return false
  end
  first = rank + 1
end
local limit = tonumber(ARGV[3])
local names = redis.call("ZRANGE", KEYS[1], first, first + limit)
local page = {#names > limit and 1 or 0}
for i = 1, math.min(limit, #names) do
  local delta = ARGV[1] .. names[i]
  local version = redis.call("HGET", delta, "a:live")
  page[#page + 1] = {
    names[i],
    tonumber(version),
    redis.call("HGET", delta, "v:" .. version),
    redis.call("HEXISTS", delta, "p:" .. version),
    redis.call("HGET", KEYS[2], redis.call("HGET", delta, "g:" .. version)),
  }
end
return page
