-- Deletes one version of a delta, or all of it.
--
-- Aliases of a deleted version go with it, but `live` moves to the newest version that is left. With its last
-- version the delta goes, and its numbers begin at 1 again.
--
-- KEYS  1 names        zset: the tenant's delta names
--       2 delta        hash: the delta itself (fields in keys.py)
--       3 digests      hash: digest -> number of versions
--       4 quarantined  hash: digest -> reason
--       5 counts       hash
--       6 pins         hash: TENANT/NAME@VERSION -> TIER:DIGEST
-- ARGV  1 name   2 version ("" for all)   3 tenant
-- Gives the digests that no version of any tenant refers to any more, or nothing when there is nothing to delete.

local fields = redis.call("HGETALL", KEYS[2])
local doomed = {}
local newest = 0
local aliases = {}
for i = 1, #fields, 2 do
  local kind, rest = string.sub(fields[i], 1, 2), string.sub(fields[i], 3)
  if kind == "g:" then
    if ARGV[2] == "" or ARGV[2] == rest then
      doomed[#doomed + 1] = {version = rest, digest = fields[i + 1]}
    else
      newest = math.max(newest, tonumber(rest))
    end
  elseif kind == "a:" and fields[i + 1] == ARGV[2] then
    aliases[#aliases + 1] = rest
  end
end
if #doomed == 0 then
  return false
end

local dropped = {}
for _, gone in ipairs(doomed) do
  if redis.call("HINCRBY", KEYS[3], gone.digest, -1) == 0 then
    redis.call("HDEL", KEYS[3], gone.digest)
    redis.call("HDEL", KEYS[4], gone.digest)
    dropped[#dropped + 1] = gone.digest
  end
  redis.call("HDEL", KEYS[2], "v:" .. gone.version, "g:" .. gone.version, "p:" .. gone.version, "d:" .. gone.digest)
  redis.call("HDEL", KEYS[6], ARGV[3] .. "/" .. ARGV[1] .. "@" .. gone.version)
end
redis.call("HINCRBY", KEYS[5], "versions", -#doomed)
if newest == 0 then
  redis.call("DEL", KEYS[2])
  redis.call("ZREM", KEYS[1], ARGV[1])
  redis.call("HINCRBY", KEYS[5], "names", -1)
else
  for _, alias in ipairs(aliases) do
    if alias == "live" then
      redis.call("HSET", KEYS[2], "a:live", tostring(newest))
    else
      redis.call("HDEL", KEYS[2], "a:" .. alias)
    end
  end
end
return dropped
