#!lua flags=allow-oom
-- Notes that records are in Postgres: takes them off the outbox, raises `flushed`, sets the TTLs that have become due.
-- Marking the same record again changes nothing.
--
-- KEYS 1 outbox stream, 2 outbox bytes string, 3 live zset, 4 ... session hashes
-- ARGV session_id ('' : the reply is about several), nonce, group, records: for each record, separated by a space,
--      entry,fact,index of its session's key from 1
-- replies marked, session_id, nonce, number of records taken off
local outbox_key, bytes_key, live_key = KEYS[1], KEYS[2], KEYS[3]
local args = named(ARGV)
local session_keys = {}
for i = 4, #KEYS do session_keys[i - 3] = KEYS[i] end

local removed, done = 0, {}
for entry, fact, index in string.gmatch(args.records, '([^, ]+),([^, ]+),(%d+)') do
  if dequeue(outbox_key, bytes_key, args.group, entry) then removed = removed + 1 end
  local session_key = session_keys[tonumber(index)]
  local tokens = done[session_key] or {}
  tokens[#tokens + 1] = ' ' .. fact .. '@' .. entry .. ' '
  done[session_key] = tokens
end

local now = now_ms()
for session_key, tokens in pairs(done) do
  local session = load(session_key)
  -- A damaged session is left for its owner to find: it keeps no TTL, so it stays.
  if session and not damage(session) then
    -- Cut out one by one: nearly always they are the first ones of a list that may be long.
    local unflushed = ' ' .. session.unflushed .. ' '
    for _, token in ipairs(tokens) do
      local from, to = string.find(unflushed, token, 1, true)
      if from then unflushed = string.sub(unflushed, 1, from) .. string.sub(unflushed, to + 1) end
    end
    -- The turns among them are in order: Postgres has all before the first.
    local first = string.match(unflushed, ' t:(%d+)@')
    local flushed = first and first - 1 or tonumber(session.turns)
    unflushed = string.sub(unflushed, 2, -2)
    if session.status == 'erased' and unflushed == '' then
      redis.call('DEL', session_key)
      redis.call('ZREM', live_key, session.session_id)
    else
      store(session_key, session, {unflushed = unflushed, flushed = flushed})
      settle(session_key, session, now)
    end
  end
end
return {'marked', args.session_id, args.nonce, removed}
