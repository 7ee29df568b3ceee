-- Writes the checkpoint of a run. ARGV: id, epoch, checkpoint. Returns 1 if the claim is held.
local id = ARGV[1]
if redis.call('HGET', epochs, id) ~= ARGV[2] or not redis.call('ZSCORE', leases, id) then
  return 0
end
redis.call('HSET', checkpoints, id, ARGV[3])
local failures, errors = string.match(redis.call('HGET', state, id) or '', '^(%d+) %d+ %d+ (.*)$')
if failures then
  redis.call('HSET', state, id, failures .. ' 0 0 ' .. errors)
end
return 1
