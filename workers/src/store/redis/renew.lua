-- Extends leases. ARGV: lease in milliseconds, then for each claim: id, epoch, progress. Returns for each claim whether
-- it is held, and why its job was cancelled, if it was.
local ids = {}
for i = 2, #ARGV, 3 do
  ids[#ids + 1] = ARGV[i]
end
local held = redis.call('HMGET', epochs, unpack(ids))
local until_now = redis.call('ZMSCORE', leases, unpack(ids))
local reasons = redis.call('HMGET', cancelled, unpack(ids))
local new_leases, new_progress, answer = {}, {}, {}
for i, id in ipairs(ids) do
  local epoch, done = ARGV[i * 3], ARGV[i * 3 + 1]
  if held[i] == epoch and until_now[i] then
    new_leases[#new_leases + 1] = now + tonumber(ARGV[1])
    new_leases[#new_leases + 1] = id
    if done ~= '' then
      new_progress[#new_progress + 1] = id
      new_progress[#new_progress + 1] = done
    end
    answer[i] = { '1', reasons[i] }
  else
    answer[i] = { '0', false }
  end
end
put('ZADD', leases, new_leases)
put('HSET', progress, new_progress)
return answer
