-- ARGV: the channel, the queue, then for each job: id, record, size, priority, kind of wait (now, in, at), its
-- milliseconds, state, unique key, its scope, its milliseconds, last epoch. Returns the ids that the jobs have.
local ids, due_now, due_later, new_waits = {}, {}, {}, {}
local size = 0
for i = 3, #ARGV, 11 do
  local id, record, length, priority = ARGV[i], ARGV[i + 1], ARGV[i + 2], tonumber(ARGV[i + 3])
  local wait, milliseconds, spent = ARGV[i + 4], tonumber(ARGV[i + 5]), ARGV[i + 6]
  local key, scope, window, epoch = ARGV[i + 7], ARGV[i + 8], tonumber(ARGV[i + 9]), ARGV[i + 10]
  local taken = false
  if key ~= '' then
    local held = redis.call('HGET', unique, key)
    if held then
      local job, _, till = string.match(held, '^(%S+) (%S+) (%S+)')
      till = tonumber(till)
      -- A key whose job is gone was not given back, since somebody deleted the job by hand.
      if job ~= id and ((till > 0 and till > now) or (till == 0 and redis.call('HEXISTS', jobs, job) == 1)) then
        taken = job
      end
    end
    if not taken then
      redis.call('HSET', unique, key, id .. ' ' .. scope .. ' ' .. string.format('%.0f', window > 0 and now + window or 0))
    end
  end
  ids[#ids + 1] = taken or id
  if not taken and redis.call('HSETNX', jobs, id, record) == 1 then
    size = size + tonumber(length)
    local due = (wait == 'in' and now + milliseconds) or (wait == 'at' and milliseconds) or now
    if due > now then
      due_later[#due_later + 1] = string.format('%.0f', due)
      due_later[#due_later + 1] = id
      if wait == 'in' then
        new_waits[#new_waits + 1] = now
        new_waits[#new_waits + 1] = id
      end
    else
      due_now[#due_now + 1] = score(priority, due)
      due_now[#due_now + 1] = id
    end
    if spent ~= '' then
      redis.call('HSET', state, id, spent)
    end
    if epoch ~= '' then
      redis.call('HSET', epochs, id, epoch)
    end
  end
end
put('ZADD', ready, due_now)
put('ZADD', scheduled, due_later)
put('ZADD', waits, new_waits)
if size > 0 then
  redis.call('INCRBY', bytes, size)
end
redis.call('PUBLISH', ARGV[1], ARGV[2])
return ids
