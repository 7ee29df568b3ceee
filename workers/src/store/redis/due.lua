-- Reads the states of all schedules. KEYS: all schedules. ARGV: the prefix of the key of a schedule. Returns the time
-- in milliseconds, and of each schedule its name and its fields.
local time = redis.call('TIME')
local found = {}
for _, name in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local fields = redis.call('HMGET', ARGV[1] .. name, 'definition', 'timing', 'last_fire', 'queued', 'paused', 'held',
    'version', 'seen_at')
  if fields[1] then
    found[#found + 1] = { name, unpack(fields) }
  end
end
return { time[1] * 1000 + math.floor(time[2] / 1000), found }
