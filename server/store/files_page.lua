-- Reads a page of a tenant's files.
--
-- KEYS  1 files  hash: the tenant's file ids -> record
--       2 order  zset: the tenant's file ids, oldest first
-- ARGV  1 the id after which to begin ("" for the first page)   2 how many   3 "asc" or "desc"
--       4 only files of this purpose ("" for all)
-- Gives {more 0|1, record ...}, or nothing when id 1 is not there.

local newest_first = ARGV[3] == "desc"
local at = 0
if ARGV[1] ~= "" then
  local rank = redis.call(newest_first and "ZREVRANK" or "ZRANK", KEYS[2], ARGV[1])
  if not rank then
    return false
  end
  at = rank + 1
end
local limit = tonumber(ARGV[2])
local page = {0}
local ids = redis.call(newest_first and "ZREVRANGE" or "ZRANGE", KEYS[2], at, -1)
for _, id in ipairs(ids) do
  local record = redis.call("HGET", KEYS[1], id)
  if ARGV[4] == "" or cjson.decode(record).purpose == ARGV[4] then
    if #page > limit then
      page[1] = 1
      break
    end
    page[#page + 1] = record
  end
end
return page
