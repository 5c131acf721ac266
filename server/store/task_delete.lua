-- Deletes a task.
--
-- KEYS  1 tasks  hash: the tenant's task names -> record
--       2 order  zset: the tenant's task names, oldest first
-- ARGV  1 name
-- Gives 1, or 0 when it does not exist.

redis.call("ZREM", KEYS[2], ARGV[1])
return redis.call("HDEL", KEYS[1], ARGV[1])
