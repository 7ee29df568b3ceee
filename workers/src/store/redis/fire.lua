-- Claims a schedule that is due; enqueue.lua follows. KEYS, after those of the prelude: the schedule, the ids of its
-- runs, its runs, their endings. ARGV: first a JSON object of the version that the schedule must have, the new
-- last_fire and queued (queued is '' for nothing), the runs (each with id, claimed_at, run and ending, '' for none),
-- and how many runs are kept that have ended, and in all. The other arguments are those of enqueue.lua. Returns
-- nothing when another process was faster.
local claim = cjson.decode(ARGV[1])
table.remove(ARGV, 1)
local schedule, run_ids, runs, endings = KEYS[18], KEYS[19], KEYS[20], KEYS[21]
if redis.call('HGET', schedule, 'version') ~= claim.version then
  return false
end
redis.call('HINCRBY', schedule, 'version', 1)
redis.call('HSET', schedule, 'last_fire', claim.last_fire)
if claim.queued == '' then
  redis.call('HDEL', schedule, 'queued')
else
  redis.call('HSET', schedule, 'queued', claim.queued)
end
for _, run in ipairs(claim.runs) do
  redis.call('ZADD', run_ids, run.claimed_at, run.id)
  redis.call('HSET', runs, run.id, run.run)
  if run.ending == '' then
    redis.call('HDEL', endings, run.id)
  else
    redis.call('HSET', endings, run.id, run.ending)
  end
end
-- Runs that have not ended are kept for longer, since overlaps are found by them.
local count = redis.call('ZCARD', run_ids)
local too_many = count > claim.kept and redis.call('ZRANGE', run_ids, 0, count - claim.kept - 1) or {}
for place, id in ipairs(too_many) do
  if count - place >= claim.kept_unfinished or redis.call('HEXISTS', endings, id) == 1 then
    redis.call('ZREM', run_ids, id)
    redis.call('HDEL', runs, id)
    redis.call('HDEL', endings, id)
  end
end
if #ARGV == 2 then
  return {}
end
