-- Adds jobs. ARGV: the channel, the queue, then for each job: id, record, size, priority, kind of wait (now, in, at),
-- its milliseconds, state, unique key, its scope, its milliseconds, last epoch. Returns the id of each job, or that of
-- the job that has its unique key.
local ids = {}
for i = 3, #ARGV, 11 do
  ids[#ids + 1] = ARGV[i]
end
local known = redis.call('HMGET', jobs, unpack(ids))
local records, due_now, due_later, new_waits = {}, {}, {}, {}
local size, added = 0, {}
for n, id in ipairs(ids) do
  local i = n * 11 - 8
  local key, taken = ARGV[i + 7], false
  if key ~= '' then
    local scope, window = ARGV[i + 8], tonumber(ARGV[i + 9])
    local held = redis.call('HGET', unique, key)
    if held then
      local job, _, till = string.match(held, '^(%S+) (%S+) (%S+)')
      till = tonumber(till)
      -- A key whose job is gone was not given back, since the job was deleted by hand.
      local lives = added[job] or redis.call('HEXISTS', jobs, job) == 1
      if job ~= id and ((till > 0 and till > now) or (till == 0 and lives)) then
        taken = job
      end
    end
    if not taken then
      redis.call('HSET', unique, key, id .. ' ' .. scope .. ' ' .. string.format('%.0f', window > 0 and now + window or 0))
    end
  end
  ids[n] = taken or id
  if not taken and not known[n] and not added[id] then
    added[id] = true
    records[#records + 1] = id
    records[#records + 1] = ARGV[i + 1]
    size = size + tonumber(ARGV[i + 2])
    local wait, due = ARGV[i + 4], now
    if wait == 'in' then
      due = now + tonumber(ARGV[i + 5])
    elseif wait == 'at' then
      due = tonumber(ARGV[i + 5])
    end
    if due > now then
      due_later[#due_later + 1] = string.format('%.0f', due)
      due_later[#due_later + 1] = id
      if wait == 'in' then
        new_waits[#new_waits + 1] = now
        new_waits[#new_waits + 1] = id
      end
    else
      due_now[#due_now + 1] = score(tonumber(ARGV[i + 3]), due)
      due_now[#due_now + 1] = id
    end
    if ARGV[i + 6] ~= '' then
      redis.call('HSET', state, id, ARGV[i + 6])
    end
    if ARGV[i + 10] ~= '' then
      redis.call('HSET', epochs, id, ARGV[i + 10])
    end
  end
end
put('HSET', jobs, records)
put('ZADD', ready, due_now)
put('ZADD', scheduled, due_later)
put('ZADD', waits, new_waits)
if size > 0 then
  redis.call('INCRBY', bytes, size)
end
redis.call('PUBLISH', ARGV[1], ARGV[2])
return ids
