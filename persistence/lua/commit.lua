#!lua flags=allow-oom
-- Commits a turn: the session and its outbox record change together. Only the holder of the fence may.
-- Committing the same turn again adds nothing. Allowed when Redis is full: begin is where the door is.
--
-- KEYS 1 session hash, 2 outbox stream, 3 outbox bytes string, 4 live zset, 5 running zset, 6 logs hash,
--      7 events stream of the turn
-- ARGV session_id, nonce, turn_id, fence, number (of the turn), turn (JSON), messages (how many it has),
--      context (JSON object, '' unchanged), hot_turns (how many turns may stay hot once flushed), channel,
--      events (what the turn's log still lacks, its end included, as in append; '' for a turn that does not stream)
-- replies (each followed by session_id and nonce)
--   committed  message_count, last_activity_at
--   lost       the session is gone, ended, or another turn has taken it: nothing was changed
--   damaged    field
local session_key, outbox_key, bytes_key, live_key, running_key, logs_key, events_key =
  KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local args = named(ARGV)
local function reply(word, ...) return {word, args.session_id, args.nonce, ...} end

local session = load(session_key)
if not session then return reply('lost') end
local broken = damage(session)
if broken then return reply('damaged', broken) end

if session.turn ~= args.turn_id or session.turn_fence ~= args.fence then
  local stored = redis.call('HGET', session_key, 't:' .. args.number)
  local readable, decoded = pcall(cjson.decode, stored or '{}')
  if not readable or type(decoded) ~= 'table' then return reply('damaged', 't:' .. args.number) end
  if decoded.id == args.turn_id then
    return reply('committed', tonumber(session.message_count), session.last_activity_at)
  end
  return reply('lost')
end

local now = now_ms()
local number = tonumber(args.number)
local fields = {
  turns = number, message_count = session.message_count + args.messages, last_activity_at = iso(now),
  status = 'active', ended_at = '',
}
fields['t:' .. number] = args.turn
if args.context ~= '' then fields.context = args.context end
store(session_key, session, fields)
emit(session_key, outbox_key, bytes_key, session, 't:' .. number, args.turn)
release(session_key, running_key, session)
redis.call('ZADD', live_key, now, args.session_id)
finish_log(logs_key, events_key, args)

-- The hot window is bounded, but a turn leaves it only when Postgres has it. The one before this stays in any case: its
-- own commit may be repeated.
local hot_turns = math.max(args.hot_turns, 2)
local first_hot, gone = tonumber(session.first_hot), {}
while first_hot <= tonumber(session.flushed) and number - first_hot + 1 > hot_turns do
  gone[#gone + 1] = 't:' .. first_hot
  first_hot = first_hot + 1
end
if #gone > 0 then
  for chunk = 1, #gone, 500 do
    redis.call('HDEL', session_key, unpack(gone, chunk, math.min(chunk + 499, #gone)))
  end
  store(session_key, session, {first_hot = first_hot})
end
return reply('committed', tonumber(session.message_count), session.last_activity_at)
