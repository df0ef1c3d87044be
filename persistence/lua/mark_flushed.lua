#!lua flags=allow-oom
-- Removes records that Postgres has from the outbox, raises `flushed`, and sets the TTLs that are due.
-- Marking the same record again changes nothing.
--
-- KEYS 1 outbox stream, 2 outbox bytes string, 3 live zset, 4 epoch hash, 5 ... session hashes
-- ARGV session_id ('' : several sessions), nonce, group,
--      epoch (in which the records were taken), records (separated by a space, each `entry,bytes,fact,index`, the index
--      that of its session's key from 1)
-- replies (session_id and nonce follow the word)
--   marked     number of records removed
--   forgotten  the records were taken in another epoch: what has their ids now may be something else
local outbox_key, bytes_key, live_key, epoch_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
local session_keys = {}
for i = 5, #KEYS do session_keys[i - 4] = KEYS[i] end

if (current_epoch(epoch_key) or '0') ~= args.epoch then return reply('forgotten') end

local removed, removed_bytes, entries, done = 0, 0, {}, {}
for entry, bytes, fact, index in string.gmatch(args.records, '([^, ]+),(%d+),([^, ]+),(%d+)') do
  entries[#entries + 1] = entry
  if redis.call('XDEL', outbox_key, entry) == 1 then
    removed, removed_bytes = removed + 1, removed_bytes + bytes
  end
  local session_key = session_keys[tonumber(index)]
  local tokens = done[session_key]
  if not tokens then
    tokens = {}
    done[session_key] = tokens
  end
  tokens[#tokens + 1] = ' ' .. fact .. '@' .. entry .. ' '
end
for chunk = 1, #entries, 500 do
  redis.call('XACK', outbox_key, args.group, unpack(entries, chunk, math.min(chunk + 499, #entries)))
end
if removed > 0 then uncount(outbox_key, bytes_key, removed_bytes) end

local now = now_ms()
for session_key, tokens in pairs(done) do
  local format, status, session_id, turns, turn, unflushed, hot_ttl_s, last_activity_at = unpack(redis.call('HMGET', session_key,
    'format', 'status', 'session_id', 'turns', 'turn', 'unflushed', 'hot_ttl_s', 'last_activity_at'))
  turns, hot_ttl_s = whole(turns), whole(hot_ttl_s)
  local last = from_iso(last_activity_at)
  -- A damaged session gets no TTL, so it stays for an operator to find.
  if format == FORMAT and status and session_id and turns and turn and unflushed and hot_ttl_s and last then
    -- Cut out one by one: they are nearly always the first of a list that may be long.
    local left = ' ' .. unflushed .. ' '
    for _, token in ipairs(tokens) do
      local from, to = string.find(left, token, 1, true)
      if from then left = string.sub(left, 1, from) .. string.sub(left, to + 1) end
    end
    -- The turns in the list are in order: Postgres has all turns before the first.
    local first = string.match(left, ' t:(%d+)@')
    left = string.sub(left, 2, -2)
    if status == 'erased' and left == '' then
      redis.call('DEL', session_key)
      redis.call('ZREM', live_key, session_id)
    else
      redis.call('HSET', session_key, 'unflushed', left, 'flushed', string.format('%d', first and first - 1 or turns))
      set_expiry(session_key, left, turn, hot_ttl_s, last, now)
    end
  end
end
return reply('marked', removed)
