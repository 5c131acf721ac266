-- Marks a digest as unfit to serve: every version with it, of any tenant, now and later.
--
-- KEYS  1 digests      hash: digest -> number of versions
--       2 quarantined  hash: digest -> reason
-- ARGV  1 digest   2 reason
-- Gives 1 when it is newly marked, 0 when it was already or when no version has it.

if redis.call("HEXISTS", KEYS[1], ARGV[1]) == 0 then
  return 0
end
return redis.call("HSETNX", KEYS[2], ARGV[1], ARGV[2])
