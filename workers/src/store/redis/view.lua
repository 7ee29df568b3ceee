-- ARGV: ids. Returns what is known of each: state, score, record, spent, epoch, worker, progress, checkpoint,
-- cancelled; or the record of one that has ended.
local answer = {}
for i, id in ipairs(ARGV) do
  local record = redis.call('HGET', jobs, id)
  if record then
    local where, at = 'ready', redis.call('ZSCORE', ready, id)
    if not at then
      where, at = 'scheduled', redis.call('ZSCORE', scheduled, id)
    end
    if not at then
      where, at = 'running', redis.call('ZSCORE', leases, id)
    end
    answer[i] = { where, at or '', record, redis.call('HGET', state, id), redis.call('HGET', epochs, id),
      redis.call('HGET', workers, id), redis.call('HGET', progress, id), redis.call('HGET', cancelled, id) }
  else
    local over = redis.call('HGET', ended, id)
    answer[i] = over and { 'ended', redis.call('ZSCORE', ended_at, id), over } or false
  end
end
return answer
