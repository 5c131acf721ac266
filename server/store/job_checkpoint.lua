-- Enters a checkpoint of a tuning job; the oldest ones beyond a number go.
--
-- KEYS  1..8 the job's (job_common.lua)
-- ARGV  1 id   2 fencing token   3 step   4 record   5 how many are kept   6 progress   7 event
-- Gives the steps of those that went, or nothing with a stale token.

local keys = job_keys(1)
if not job_held(keys, ARGV[1], ARGV[2]) then
  return false
end
redis.call("HSET", keys.checkpoints, ARGV[3], ARGV[4])
redis.call("HSET", keys.job, "progress", ARGV[6])
job_note(keys, ARGV[7])
local steps = redis.call("HKEYS", keys.checkpoints)
table.sort(steps, function(a, b) return tonumber(a) < tonumber(b) end)
local gone = {}
for i = 1, #steps - tonumber(ARGV[5]) do
  redis.call("HDEL", keys.checkpoints, steps[i])
  gone[#gone + 1] = steps[i]
end
return gone
