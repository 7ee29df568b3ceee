-- Pauses a schedule, or resumes it from now on. KEYS: the schedule. ARGV: 1 to pause it, 0 to resume it. Returns 1 if
-- there is such a schedule, and 0 otherwise.
local known = redis.call('HMGET', KEYS[1], 'paused', 'held')
if not known[1] then
  return 0
end
if (known[2] or known[1]) == '1' and ARGV[1] == '0' then
  local time = redis.call('TIME')
  redis.call('HSET', KEYS[1], 'last_fire', string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)))
end
if known[1] == ARGV[1] then
  redis.call('HDEL', KEYS[1], 'held')
else
  redis.call('HSET', KEYS[1], 'held', ARGV[1])
end
redis.call('HINCRBY', KEYS[1], 'version', 1)
return 1
