-- Cancels a job. ARGV: id, reason, size of the payload, unique key, the record to keep. Returns now, soon or never.
local id = ARGV[1]
if redis.call('ZSCORE', leases, id) then
  redis.call('HSETNX', cancelled, id, ARGV[2])
  return 'soon'
end
if redis.call('HEXISTS', jobs, id) == 0 then
  return 'never'
end
redis.call('ZREM', ready, id)
redis.call('ZREM', scheduled, id)
redis.call('ZREM', waits, id)
if ARGV[4] ~= '' then
  give_back(ARGV[4], id, false)
end
redis.call('HSET', ended, id, ARGV[5])
redis.call('ZADD', ended_at, now, id)
forget({ id }, tonumber(ARGV[3]))
return 'now'
