-- ARGV: how many of the first to look at. Returns, as it is at one moment, how many bytes wait, how many jobs are ready,
-- in the inbox, scheduled and in somebody's hands; and the scores of the first.
return {
  redis.call('GET', bytes),
  redis.call('ZCARD', ready),
  redis.call('XLEN', inbox),
  redis.call('ZCARD', scheduled),
  redis.call('ZCARD', leases),
  redis.call('ZRANGE', ready, 0, ARGV[1], 'WITHSCORES')
}
