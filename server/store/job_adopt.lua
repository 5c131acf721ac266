-- Ends the leases of a worker that is known to be dead, so that its jobs can be claimed at once.
--
-- KEYS  1 leases  zset: job id, by its lease's end
-- ARGV  1 the worker   2 what job hashes' names begin with (the rest is the job's id; they depend on 1)
-- Gives how many.

local count = 0
for _, id in ipairs(redis.call("ZRANGE", KEYS[1], 0, -1)) do
  if redis.call("HGET", ARGV[2] .. id, "owner") == ARGV[1] then
    redis.call("ZADD", KEYS[1], 0, id)
    count = count + 1
  end
end
return count
