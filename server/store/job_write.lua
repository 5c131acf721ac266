-- What the holder of a tuning job's lease writes, all of it or, with a stale token, nothing.
--
-- KEYS  1..8 the job's (job_common.lua)
-- ARGV  1 id   2 tenant   3 fencing token   4 now   5 the lease's new end   6 progress   7 spec   8 state to go to: `queued`,
--       `failed`, or `rest`: `paused` if that is wished, else `queued`   9 error   10 result files   (5 to 10: "" to leave as it
--       is)   11... events
-- Gives {state, wish}, or nothing with a stale token.

local keys = job_keys(1)
local id, tenant = ARGV[1], ARGV[2]
if not job_held(keys, id, ARGV[3]) then
  return false
end
if ARGV[5] ~= "" then
  redis.call("ZADD", keys.leases, ARGV[5], id)
end
for place, field in pairs({[6] = "progress", [7] = "spec", [9] = "error", [10] = "results"}) do
  if ARGV[place] ~= "" then
    redis.call("HSET", keys.job, field, ARGV[place])
  end
end
for i = 11, #ARGV do
  job_note(keys, ARGV[i])
end
local status = ARGV[8]
if status == "rest" then
  status = redis.call("HGET", keys.job, "wish") == "pause" and "paused" or "queued"
end
if status ~= "" then
  job_move(keys, id, tenant, status, ARGV[4])
end
return {redis.call("HGET", keys.job, "status"), redis.call("HGET", keys.job, "wish")}
