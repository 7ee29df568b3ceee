-- Deletes old jobs that have ended. ARGV: for how many milliseconds they are kept, how many to delete at most, and the
-- cursor of the scan over unique keys. Returns how many jobs were deleted, and the next cursor.
local ids = redis.call('ZRANGEBYSCORE', ended_at, '-inf', string.format('%.0f', now - tonumber(ARGV[1])), 'LIMIT', 0, tonumber(ARGV[2]))
if #ids > 0 then
  redis.call('HDEL', ended, unpack(ids))
  redis.call('HDEL', checkpoints, unpack(ids))
  redis.call('ZREM', ended_at, unpack(ids))
end
-- Keys whose window is over are deleted, some of them each time.
local keys = redis.call('HSCAN', unique, ARGV[3], 'COUNT', 200)
for i = 1, #keys[2], 2 do
  local till = tonumber(string.match(keys[2][i + 1], '(%d+)$'))
  if till > 0 and till <= now then
    redis.call('HDEL', unique, keys[2][i])
  end
end
return { #ids, keys[1] }
