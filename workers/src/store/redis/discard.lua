-- Deletes jobs that have ended. ARGV: 1 to delete their checkpoints, too, then the ids. Returns how many jobs it
-- deleted.
local ids = { unpack(ARGV, 2) }
redis.call('ZREM', ended_at, unpack(ids))
if ARGV[1] == '1' then
  redis.call('HDEL', checkpoints, unpack(ids))
end
return redis.call('HDEL', ended, unpack(ids))
