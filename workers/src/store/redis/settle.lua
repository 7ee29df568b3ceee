-- Settles jobs. ARGV: the channel, the queue, then for each claim: its transition (f finished, a again, e ended), id,
-- epoch, size of the payload, unique key, wait in milliseconds, priority, when the job was due, and its state (a) or
-- the record to keep (e). Returns 1 for each claim that was held, and 0 for the others.
local ids = {}
for i = 3, #ARGV, 9 do
  ids[#ids + 1] = ARGV[i + 1]
end
local held = redis.call('HMGET', epochs, unpack(ids))
local until_now = redis.call('ZMSCORE', leases, unpack(ids))
local answer, gone, size, settled = {}, {}, 0, {}
local finished = {}
local due_now, due_later, new_waits, new_states, idle, new_ended, new_ended_at = {}, {}, {}, {}, {}, {}, {}
for i, id in ipairs(ids) do
  local at = 3 + (i - 1) * 9
  local fate, key, wait, priority = ARGV[at], ARGV[at + 4], tonumber(ARGV[at + 5]), tonumber(ARGV[at + 6])
  local due, text = tonumber(ARGV[at + 7]), ARGV[at + 8]
  if held[i] == ARGV[at + 2] and until_now[i] and not settled[id] then
    answer[i] = 1
    settled[id] = true
    if fate == 'a' then
      if wait > 0 then
        due_later[#due_later + 1] = string.format('%.0f', now + wait)
        due_later[#due_later + 1] = id
        new_waits[#new_waits + 1] = now
        new_waits[#new_waits + 1] = id
      else
        due_now[#due_now + 1] = score(priority, math.min(due, now))
        due_now[#due_now + 1] = id
      end
      new_states[#new_states + 1] = id
      new_states[#new_states + 1] = text
      idle[#idle + 1] = id
    else
      gone[#gone + 1] = id
      size = size + tonumber(ARGV[at + 3])
      if key ~= '' then
        give_back(key, id, false)
      end
      if fate == 'e' then
        new_ended[#new_ended + 1] = id
        new_ended[#new_ended + 1] = text
        new_ended_at[#new_ended_at + 1] = now
        new_ended_at[#new_ended_at + 1] = id
      else
        finished[#finished + 1] = id
      end
    end
  else
    answer[i] = 0
  end
end
put('HSET', ended, new_ended)
put('ZADD', ended_at, new_ended_at)
put('ZADD', scheduled, due_later)
put('ZADD', waits, new_waits)
put('ZADD', ready, due_now)
put('HSET', state, new_states)
if #idle > 0 then
  redis.call('ZREM', leases, unpack(idle))
  redis.call('HDEL', workers, unpack(idle))
end
forget(gone, size)
put('HDEL', checkpoints, finished)
if #due_now > 0 then
  redis.call('PUBLISH', ARGV[1], ARGV[2])
end
return answer
