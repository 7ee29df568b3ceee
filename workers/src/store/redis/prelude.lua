-- Every script begins with this. All keys of a queue share one hash tag; their order is that of PARTS in redis.rs.
--
-- Commands take many fields at once wherever there are many jobs: a call from Lua costs more than its work.
-- Callers bound the number of fields: at 8,000 arguments unpack() fails.
local jobs, state, epochs = KEYS[1], KEYS[2], KEYS[3]
local ready, scheduled, waits, leases = KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local workers, progress, checkpoints, cancelled = KEYS[8], KEYS[9], KEYS[10], KEYS[11]
local ended, ended_at, unique, bytes = KEYS[12], KEYS[13], KEYS[14], KEYS[15]
local inbox, paused = KEYS[16], KEYS[17]

local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

-- A lower priority goes first, and then the job that has been due for longer. Beyond a priority of 2,000 a
-- score tells times apart by some milliseconds only.
local function score(priority, due)
  return string.format('%.0f', priority * 4398046511104 + due)
end

local function priority_of(record)
  -- Another program may have written the record. Then it is read, and the job is dead, when its turn comes.
  return tonumber(string.match(record, '^-?%d+')) or 0
end

-- Adds the entries of a list to a sorted set or a hash, if there are any.
local function put(command, key, list)
  if #list > 0 then
    redis.call(command, key, unpack(list))
  end
end

-- Removes jobs that are over from the jobs that are not. Checkpoints of jobs that are kept are kept, too.
local function forget(ids, size)
  if #ids == 0 then
    return
  end
  for _, key in ipairs({ jobs, state, epochs, workers, progress, cancelled }) do
    redis.call('HDEL', key, unpack(ids))
  end
  redis.call('ZREM', leases, unpack(ids))
  if size > 0 then
    redis.call('DECRBY', bytes, string.format('%.0f', size))
  end
end

-- Gives back a unique key, unless it is for a window or another job has it.
local function give_back(key, id, only_started)
  local held = redis.call('HGET', unique, key)
  if not held then
    return
  end
  local job, scope = string.match(held, '^(%S+) (%S+)')
  if job == id and scope ~= 'window' and (scope == 'started' or not only_started) then
    redis.call('HDEL', unique, key)
  end
end

-- Claims jobs: their epochs rise, and never below the clock, so that a server that has lost its last writes
-- hands out none a second time. Returns seven values for each job.
local function take(ids, scores, worker, lease)
  local found = {}
  if #ids == 0 then
    return found
  end
  local records = redis.call('HMGET', jobs, unpack(ids))
  local states = redis.call('HMGET', state, unpack(ids))
  local last = redis.call('HMGET', epochs, unpack(ids))
  local saved = redis.call('HMGET', checkpoints, unpack(ids))
  local new_leases, new_epochs, new_workers = {}, {}, {}
  local clock = time[1] * 1000000 + time[2]
  for i, id in ipairs(ids) do
    if records[i] then
      local epoch = string.format('%.0f', math.max((tonumber(last[i]) or 0) + 1, clock))
      new_leases[#new_leases + 1] = now + lease
      new_leases[#new_leases + 1] = id
      new_epochs[#new_epochs + 1] = id
      new_epochs[#new_epochs + 1] = epoch
      new_workers[#new_workers + 1] = id
      new_workers[#new_workers + 1] = worker
      found[#found + 1] = { id, epoch, last[i] and '0' or '1', scores[i] or '', records[i], states[i] or '', saved[i] or false }
    else
      redis.call('ZREM', leases, id)
    end
  end
  put('ZADD', leases, new_leases)
  put('HSET', epochs, new_epochs)
  put('HSET', workers, new_workers)
  return found
end
