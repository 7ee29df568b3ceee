-- Upholds the definition of a process. KEYS: the schedule, all schedules. ARGV: name, definition, timing, whether the
-- schedule is paused (1 or 0), and for how many milliseconds after it was last upheld another definition stays.
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local known = redis.call('HMGET', KEYS[1], 'definition', 'timing', 'paused', 'held', 'seen_at')
local at = string.format('%.0f', now)
redis.call('SADD', KEYS[2], ARGV[1])
if not known[1] then
  redis.call('HSET', KEYS[1], 'definition', ARGV[2], 'timing', ARGV[3], 'paused', ARGV[4], 'last_fire', at,
    'version', 0, 'seen_at', at)
  return
end
local same = known[1] == ARGV[2]
if not same and tonumber(known[5]) > now - tonumber(ARGV[5]) then
  return
end
redis.call('HSET', KEYS[1], 'seen_at', at)
if same then
  return
end
local was_paused = (known[4] or known[3]) == '1'
local is_paused = (known[4] or ARGV[4]) == '1'
if known[2] ~= ARGV[3] then
  redis.call('HDEL', KEYS[1], 'queued')
end
if known[2] ~= ARGV[3] or (was_paused and not is_paused) then
  redis.call('HSET', KEYS[1], 'last_fire', at)
end
redis.call('HSET', KEYS[1], 'definition', ARGV[2], 'timing', ARGV[3], 'paused', ARGV[4])
redis.call('HINCRBY', KEYS[1], 'version', 1)
