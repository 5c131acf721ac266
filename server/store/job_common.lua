-- What the scripts of tuning jobs share: put before them, see `load_script`.

local ENDED = {succeeded = true, failed = true, cancelled = true}
local LONGEST_HISTORY = 10000 -- events kept of a job

-- The keys of one job, KEYS[first] and after, in the order of `Keys.of_job`.
local function job_keys(first)
  return {
    job = KEYS[first],
    events = KEYS[first + 1],
    checkpoints = KEYS[first + 2],
    states = KEYS[first + 3],
    leases = KEYS[first + 4],
    ring = KEYS[first + 5],
    queue = KEYS[first + 6],
    active = KEYS[first + 7],
  }
end

-- Appends an event (JSON; "" for none).
local function job_note(keys, event)
  if event ~= "" then
    local number = redis.call("HINCRBY", keys.job, "events", 1)
    redis.call("XADD", keys.events, "MAXLEN", LONGEST_HISTORY, number .. "-0", "e", event)
  end
end

-- Brings the job to another state, with every index that goes by it.
local function job_move(keys, id, tenant, status, now)
  local before = redis.call("HGET", keys.job, "status")
  redis.call("HSET", keys.job, "status", status)
  redis.call("HINCRBY", keys.states, before, -1)
  redis.call("HINCRBY", keys.states, status, 1)
  if before == "queued" then
    redis.call("ZREM", keys.queue, id)
  end
  if status ~= "running" then
    redis.call("ZREM", keys.leases, id)
    redis.call("HSET", keys.job, "wish", "", "owner", "")
  end
  if status == "queued" then
    redis.call("ZADD", keys.queue, redis.call("HGET", keys.job, "serial"), id)
    if not redis.call("LPOS", keys.ring, tenant) then
      redis.call("RPUSH", keys.ring, tenant)
    end
  end
  if ENDED[status] then
    redis.call("SREM", keys.active, id)
    redis.call("HSET", keys.job, "finished_at", now)
  end
end

-- Whether the holder of this fencing token may still write.
local function job_held(keys, id, token)
  return redis.call("HGET", keys.job, "token") == token and redis.call("ZSCORE", keys.leases, id)
end
