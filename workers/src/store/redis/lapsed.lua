-- Claims jobs whose leases have expired. ARGV: highest number of jobs, lease in milliseconds, worker. Returns the time,
-- the jobs, and why each of them was cancelled.
local limit, lease, worker = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]

-- Jobs that wait for a duration, and not until a time, wait anew when the clock has been set back.
for _, id in ipairs(redis.call('ZRANGEBYSCORE', waits, now + 1000, '+inf', 'LIMIT', 0, 500)) do
  local due, since = redis.call('ZSCORE', scheduled, id), redis.call('ZSCORE', waits, id)
  if due then
    redis.call('ZADD', scheduled, string.format('%.0f', due - since + now), id)
    redis.call('ZADD', waits, now, id)
  else
    redis.call('ZREM', waits, id)
  end
end

-- Leases that have ended, and leases that last for longer than any can: the clock was set back then.
local ids = redis.call('ZRANGEBYSCORE', leases, '-inf', '(' .. now, 'LIMIT', 0, limit)
if #ids < limit then
  local odd = redis.call('ZRANGEBYSCORE', leases, now + 3 * lease, '+inf', 'LIMIT', 0, limit - #ids)
  for _, id in ipairs(odd) do
    ids[#ids + 1] = id
  end
end
local found = take(ids, {}, worker, lease)
local reasons = {}
for i, job in ipairs(found) do
  reasons[i] = redis.call('HGET', cancelled, job[1])
end
return { tostring(now), found, reasons }
