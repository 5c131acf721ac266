-- Reads a page of a tenant's tuning jobs, newest first.
--
-- KEYS  1 jobs  zset: the tenant's job ids, oldest first
-- ARGV  1 the id after which to begin ("" for the first page)   2 how many   3 what job hashes' names begin with (the rest is
--       the job's id; they depend on what is read)
-- Gives {more 0|1, {id, field, value, ...} ...}, or nothing when id 1 is not there.

local first = 0
if ARGV[1] ~= "" then
  local rank = redis.call("ZREVRANK", KEYS[1], ARGV[1])
  if not rank then
    return false
  end
  first = rank + 1
end
local limit = tonumber(ARGV[2])
local ids = redis.call("ZREVRANGE", KEYS[1], first, first + limit)
local page = {#ids > limit and 1 or 0}
for i = 1, math.min(limit, #ids) do
  local fields = redis.call("HGETALL", ARGV[3] .. ids[i])
  table.insert(fields, 1, ids[i])
  page[#page + 1] = fields
end
return page
