-- ARGV: whether their checkpoints are wanted no more (1), then ids of jobs that have ended. Returns how many there
-- were.
local ids = { unpack(ARGV, 2) }
redis.call('ZREM', ended_at, unpack(ids))
if ARGV[1] == '1' then
  redis.call('HDEL', checkpoints, unpack(ids))
end
return redis.call('HDEL', ended, unpack(ids))
