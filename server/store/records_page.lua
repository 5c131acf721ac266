-- Reads a page of records, oldest first.
--
-- KEYS  1 records  hash: name -> record
--       2 order    zset: names, oldest first
-- ARGV  1 the name after which to begin ("" for the first page)   2 how many
-- Gives {more 0|1, record ...}, or nothing when name 1 is not there.

local first = 0
if ARGV[1] ~= "" then
  local rank = redis.call("ZRANK", KEYS[2], ARGV[1])
  if not rank then
    return false
  end
  first = rank + 1
end
local limit = tonumber(ARGV[2])
local names = redis.call("ZRANGE", KEYS[2], first, first + limit)
local page = {#names > limit and 1 or 0}
for i = 1, math.min(limit, #names) do
  page[#page + 1] = redis.call("HGET", KEYS[1], names[i])
end
return page
