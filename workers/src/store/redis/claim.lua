-- Claims jobs. ARGV: highest number of jobs, lease in milliseconds, worker, highest number of jobs to take over from
-- the inbox, and the id that their ids are made of. Returns the time, when the next job is due ('' if none is
-- scheduled), and the jobs.
local limit, lease, worker = tonumber(ARGV[1]), tonumber(ARGV[2]), ARGV[3]
if redis.call('EXISTS', paused) == 1 then
  return { tostring(now), '', {} }
end

-- Returns the number in a text, cut to least and most; 0 if the text is no number.
local function number_of(text, least, most)
  local number = tonumber(text)
  if not number or number ~= number then
    return 0
  end
  return math.max(least, math.min(most, number))
end

-- Entries of other programs become jobs like any others.
if redis.call('XLEN', inbox) > 0 then
  for i, entry in ipairs(redis.call('XRANGE', inbox, '-', '+', 'COUNT', ARGV[4])) do
    local fields = {}
    for f = 1, #entry[2], 2 do
      fields[entry[2][f]] = entry[2][f + 1]
    end
    local id, payload = fields.id or '', fields.payload or 'null'
    -- An id that is no UUID could not be read again, and is replaced.
    if not string.match(id, '^%x%x%x%x%x%x%x%x%-%x%x%x%x%-%x%x%x%x%-%x%x%x%x%-%x%x%x%x%x%x%x%x%x%x%x%x$') then
      id = string.sub(ARGV[5], 1, 34) .. string.format('%02x', i)
    end
    id = string.lower(id)
    local priority = math.floor(number_of(fields.priority, -32768, 32767))
    local header = cjson.encode({ kind = fields.kind or '', created_at = now, trace = fields.trace })
    if redis.call('HSETNX', jobs, id, priority .. ' ' .. header .. '\n' .. payload) == 1 then
      local due = now + math.floor(number_of(fields.delay, 0, 31536000) * 1000)
      redis.call('INCRBY', bytes, #payload)
      if due > now then
        redis.call('ZADD', scheduled, due, id)
        redis.call('ZADD', waits, now, id)
      else
        redis.call('ZADD', ready, score(priority, due), id)
      end
    end
    redis.call('XDEL', inbox, entry[1])
  end
end

-- A slice of the jobs that have become due is made ready.
local due = redis.call('ZRANGEBYSCORE', scheduled, '-inf', now, 'WITHSCORES', 'LIMIT', 0, 500)
if #due > 0 then
  local ids, new_ready = {}, {}
  for i = 1, #due, 2 do
    ids[#ids + 1] = due[i]
  end
  local records = redis.call('HMGET', jobs, unpack(ids))
  for i, id in ipairs(ids) do
    if records[i] then
      new_ready[#new_ready + 1] = score(priority_of(records[i]), tonumber(due[i * 2]))
      new_ready[#new_ready + 1] = id
    end
  end
  put('ZADD', ready, new_ready)
  redis.call('ZREM', scheduled, unpack(ids))
  redis.call('ZREM', waits, unpack(ids))
end

local popped = redis.call('ZPOPMIN', ready, limit)
local ids, scores = {}, {}
for i = 1, #popped, 2 do
  ids[#ids + 1] = popped[i]
  scores[#scores + 1] = popped[i + 1]
end
local found = take(ids, scores, worker, lease)
local next_due = redis.call('ZRANGE', scheduled, 0, 0, 'WITHSCORES')
return { tostring(now), next_due[2] or '', found }
