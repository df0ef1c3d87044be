#!lua flags=allow-oom
-- Commits a turn: the session and its outbox record change together. Only the holder of the fence may, who knows the session as
-- begin found it: what the record says of it is compared by its revision, not read again.
-- Committing the same turn again adds nothing. Allowed when Redis is full: begin is where the door is.
--
-- KEYS 1 session hash, 2 outbox stream, 3 outbox bytes string, 4 live zset, 5 running zset, 6 logs hash,
--      7 events stream of the turn
-- ARGV session_id, nonce, turn_id, fence, revision (of the session before), number (of the turn), turn (JSON),
--      message_count, last_activity_at, last_activity_ms (the same), context (JSON object, '' unchanged),
--      described (the session after the turn, as JSON), hot_turns (how many turns may stay hot once flushed), channel,
--      events (what the turn's log still lacks, its end included, as in append; '' for a turn that does not stream), first,
--      last, keep_from and log_ttl_ms
-- replies (each followed by session_id and nonce)
--   committed
--   changed    header: the session has become another revision under the turn; commit what follows from that
--   lost       the session is gone, ended, or another turn has taken it: nothing was changed
--   damaged    field
local session_key, outbox_key, bytes_key, live_key, running_key, logs_key, events_key =
  KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]
local args = {
  session_id = ARGV[1], nonce = ARGV[2], turn_id = ARGV[3], fence = ARGV[4], revision = ARGV[5], number = ARGV[6],
  turn = ARGV[7], message_count = ARGV[8], last_activity_at = ARGV[9], last_activity_ms = ARGV[10], context = ARGV[11],
  described = ARGV[12], hot_turns = ARGV[13], channel = ARGV[14], events = ARGV[15], first = ARGV[16], last = ARGV[17],
  keep_from = ARGV[18], log_ttl_ms = ARGV[19],
}
local function reply(word, ...) return {word, args.session_id, args.nonce, ...} end

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

-- The hot window is bounded, but a turn leaves it only when Postgres has it. The one before this stays in any case: its
-- own commit may be repeated.
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
finish_log(logs_key, events_key, args)
return reply('committed')
