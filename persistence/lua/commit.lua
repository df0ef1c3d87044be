#!lua flags=allow-oom
-- Commits a turn: the session and its outbox record change together. Only the holder of the fence may. It knows the session
-- as begin found it, so the record's session is not read again but compared by its revision. Committing the same turn again
-- adds nothing. Allowed when Redis is full: begin refuses turns then.
--
-- KEYS 1 session hash, 2 outbox stream, 3 outbox bytes string, 4 live zset, 5 running zset, 6 logs hash,
--      7 events stream of the turn
-- ARGV session_id, nonce, turn_id, fence, revision (of the session before), number (of the turn), turn (JSON),
--      message_count, last_activity_at, last_activity_ms (the same), context (JSON object, '' unchanged),
--      described (the session after the turn, as JSON), hot_turns (how many turns may stay hot once flushed), channel,
--      events (JSON array, those missing in the turn's log, its end included; '' if the turn does not stream),
--      first, last (numbers of the first and the last of them), keep_from, log_ttl_ms
-- replies (session_id and nonce follow the word)
--   committed
--   changed    header: the session got another revision while the turn ran; commit again on that one
--   lost       the session is gone, ended, or held by another turn: nothing was changed
--   damaged    field
local session_key, outbox_key, bytes_key, live_key, running_key, logs_key, events_key =
  KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]

local turn_id, fence, revision, unflushed, flushed, first_hot = unpack(redis.call('HMGET', session_key,
  'turn', 'turn_fence', 'revision', 'unflushed', 'flushed', 'first_hot'))
local field = 't:' .. args.number
if turn_id ~= args.turn_id or fence ~= args.fence then
  local stored = redis.call('HGET', session_key, field)
  local readable, decoded = pcall(cjson.decode, stored or '{}')
  if not readable or type(decoded) ~= 'table' then return reply('damaged', field) end
  return reply(decoded.id == args.turn_id and 'committed' or 'lost')
end
if revision ~= args.revision then
  if not whole(revision) then return reply('damaged', 'revision') end
  return reply('changed', redis.call('HMGET', session_key, unpack(HEADER)))
end
flushed, first_hot = whole(flushed), whole(first_hot)
if not flushed then return reply('damaged', 'flushed') end
if not first_hot then return reply('damaged', 'first_hot') end
if not unflushed then return reply('damaged', 'unflushed') end

-- The hot window is bounded, but a turn leaves it only when Postgres has it. The turn before this one always stays: its
-- commit may be repeated.
local number, hot_turns, gone = tonumber(args.number), math.max(args.hot_turns, 2), {}
while first_hot <= flushed and number - first_hot + 1 > hot_turns do
  gone[#gone + 1] = 't:' .. first_hot
  first_hot = first_hot + 1
end
for chunk = 1, #gone, 500 do
  redis.call('HDEL', session_key, unpack(gone, chunk, math.min(chunk + 499, #gone)))
end

local entry = enqueue(outbox_key, bytes_key, record(args.session_id, field, args.described, args.turn))
local changes = {
  field, args.turn, 'turns', args.number, 'message_count', args.message_count, 'last_activity_at', args.last_activity_at,
  'revision', string.format('%d', revision + 1), 'unflushed', with_unflushed(unflushed, field, entry),
  'first_hot', string.format('%d', first_hot), 'status', 'active', 'ended_at', '',
  'turn', '', 'turn_fence', '', 'turn_lease_until', '', 'turn_message_id', '',
}
if args.context ~= '' then
  changes[#changes + 1] = 'context'
  changes[#changes + 1] = args.context
end
redis.call('HSET', session_key, unpack(changes))
redis.call('ZREM', running_key, args.session_id)
redis.call('ZADD', live_key, args.last_activity_ms, args.session_id)
finish_log(logs_key, events_key)
return reply('committed')
