-- Reads all versions of a delta.
--
-- KEYS  1 delta        hash: the delta itself (fields in keys.py)
--       2 quarantined  hash: digest -> reason
-- Gives a list of {version, JSON, public 0|1, reason of its quarantine or nothing}, in no order; empty when there is no such delta.

local fields = redis.call("HGETALL", KEYS[1])
local all = {}
for i = 1, #fields, 2 do
  all[fields[i]] = fields[i + 1]
end
local found = {}
for field, value in pairs(all) do
  if string.sub(field, 1, 2) == "v:" then
    local version = string.sub(field, 3)
    local public = all["p:" .. version] and 1 or 0
    local reason = redis.call("HGET", KEYS[2], all["g:" .. version])
    found[#found + 1] = {tonumber(version), value, public, reason}
  end
end
return found
