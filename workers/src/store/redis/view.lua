-- Reads jobs for operators. ARGV: ids. Returns for each job: where it is, score, record, state (failures, crashes and
-- errors), epoch, worker, progress, and why it was cancelled; for a job that has ended: 'ended', when it ended, and the
-- record that is kept; false for a job that is not there.
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
