-- Counts the jobs of a queue at one moment. ARGV: the last rank whose score is returned. Returns the length of all
-- payloads, how many jobs are ready, in the inbox, scheduled and claimed, and the scores of the first ready jobs.
return {
  redis.call('GET', bytes),
  redis.call('ZCARD', ready),
  redis.call('XLEN', inbox),
  redis.call('ZCARD', scheduled),
  redis.call('ZCARD', leases),
  redis.call('ZRANGE', ready, 0, ARGV[1], 'WITHSCORES')
}
