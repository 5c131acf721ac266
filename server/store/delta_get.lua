-- Reads one version of a delta, named by its number or by an alias.
--
-- KEYS  1 delta        hash: the delta itself (fields in keys.py)
--       2 quarantined  hash: digest -> reason
-- ARGV  1 version ("" if by alias)   2 alias   3 "1": only if that version is public
-- Gives {version, JSON, public 0|1, reason of its quarantine or nothing}, or nothing.

local version = ARGV[1]
if version == "" then
  version = redis.call("HGET", KEYS[1], "a:" .. ARGV[2])
  if not version then
    return false
  end
end
local record = redis.call("HGET", KEYS[1], "v:" .. version)
local public = redis.call("HEXISTS", KEYS[1], "p:" .. version)
if not record or (ARGV[3] == "1" and public == 0) then
  return false
end
local digest = redis.call("HGET", KEYS[1], "g:" .. version)
return {tonumber(version), record, public, redis.call("HGET", KEYS[2], digest)}
