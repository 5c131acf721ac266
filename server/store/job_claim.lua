-- Leases a tuning job to a worker: one whose lease has run out, else the oldest queued one of the tenant whose turn it is.
--
-- KEYS  1 leases   2 ring   3 states
-- ARGV  1 now   2 the lease's end   3 who shall hold it   4 what job hashes' names begin with   5 what the names of tenants'
--       queues begin with (they depend on what is read)
-- Gives {id, tenant, token, state, 1 if it was taken over}, or nothing when there is none.

local function lease(id, tenant, status, taken)
  local job = ARGV[4] .. id
  redis.call("HSET", job, "owner", ARGV[3])
  redis.call("ZADD", KEYS[1], ARGV[2], id)
  return {id, tenant, redis.call("HINCRBY", job, "token", 1), status, taken}
end

local expired = redis.call("ZRANGEBYSCORE", KEYS[1], "-inf", ARGV[1], "LIMIT", 0, 1)[1]
if expired then
  local found = redis.call("HMGET", ARGV[4] .. expired, "tenant", "status")
  return lease(expired, found[1], found[2], 1)
end
for _ = 1, redis.call("LLEN", KEYS[2]) do
  local tenant = redis.call("LPOP", KEYS[2])
  local queue = ARGV[5] .. tenant
  local id = redis.call("ZRANGE", queue, 0, 0)[1]
  if id then
    if redis.call("ZCARD", queue) > 1 then
      redis.call("RPUSH", KEYS[2], tenant)
    end
    job_move({job = ARGV[4] .. id, states = KEYS[3], queue = queue}, id, tenant, "running", ARGV[1])
    return lease(id, tenant, "running", 0)
  end
end
return false
