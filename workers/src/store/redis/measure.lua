-- Counts the jobs of a queue at one moment. ARGV: the last rank whose score is returned. Returns the length of all
-- payloads, how many jobs are ready, in the inbox, scheduled and claimed, and the scores of the first ready jobs. A
-- scheduled job that is due is ready, also before a claim has found it.
local due = redis.call('ZCOUNT', scheduled, '-inf', now)
return {
  redis.call('GET', bytes),
  redis.call('ZCARD', ready) + due,
  redis.call('XLEN', inbox),
  redis.call('ZCARD', scheduled) - due,
  redis.call('ZCARD', leases),
  redis.call('ZRANGE', ready, 0, ARGV[1], 'WITHSCORES')
}
