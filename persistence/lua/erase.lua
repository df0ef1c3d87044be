#!lua flags=allow-oom
-- Erases a session: its hash, its records on the outbox, its dead letters, its turn logs. A tombstone (a hash without content,
-- with the status `erased`) stays until Postgres has erased its rows, so that nobody finds them in the meantime.
--
-- KEYS 1 session hash, 2 outbox stream, 3 outbox bytes string, 4 fence string, 5 live zset, 6 running zset, 7 dead stream,
--      8 ticket string, 9 logs hash, 10 epoch hash, 11 ... events streams of the turns in `logged`
-- ARGV session_id, nonce, agent_id ('' any), website_domain ('' any), authorized (1 | 0),
--      user_id ('' none), trusted (1 | 0), group, ticket_ms, channel,
--      logged (ids of the turns with a log that the caller knows of, separated by a space),
--      idle_ms ('' : in any case, else only without activity for that long),
--      forgotten (id of a session that Postgres has erased and that Redis has again: erase this one, of whatever epoch; else '')
-- replies (session_id and nonce follow the word)
--   erased  id (uuid), also if it was erased before and idle_ms is ''
--   kept    it is not idle, was erased before, or is not the forgotten one
--   logs    the right value of `logged`: call again with it and its keys
--   absent  ticket, id
--   foreign | unauthorized
local session_key, outbox_key, bytes_key, fence_key, live_key, running_key, dead_key, ticket_key, logs_key, epoch_key =
  KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8], KEYS[9], KEYS[10]
local events_keys = {}
for i = 11, #KEYS do events_keys[i - 10] = KEYS[i] end

local session = load(session_key)
if args.forgotten ~= '' then
  if not session or session.id ~= args.forgotten then return reply('kept') end
elseif not session or session.epoch ~= current_epoch(epoch_key) and not damage(session) then
  return absent(epoch_key, fence_key, ticket_key, session)
end
local refused = refusal(session)
if refused == 'erased' then
  if args.idle_ms ~= '' then return reply('kept') end
  if args.forgotten ~= '' then store(session_key, session, {epoch = current_epoch(epoch_key) or '0'}) end
  return reply('erased', session.id)
end
if refused then return reply(refused) end
-- A damaged session can be erased as long as its id can be read.
if not session.id or session.id == '' then return reply('damaged', 'id') end
if args.idle_ms ~= '' then
  local last = from_iso(session.last_activity_at)
  if not last then return reply('damaged', 'last_activity_at') end
  if session.turn ~= '' or now_ms() - last < tonumber(args.idle_ms) then return reply('kept') end
end

local turn_ids = {}
for index, one in ipairs(live_logs(logs_key, args.session_id, now_ms())) do turn_ids[index] = one[1] end
local logged = table.concat(turn_ids, ' ')
if logged ~= args.logged then return reply('logs', logged) end
for index in ipairs(events_keys) do redis.call('DEL', events_keys[index]) end

for entry in string.gmatch(session.unflushed or '', '@(%S+)') do
  dequeue(outbox_key, bytes_key, args.group, entry)
end
for entry in string.gmatch(redis.call('HGET', session_key, 'dead') or '', '@(%S+)') do
  redis.call('XDEL', dead_key, entry)
end
local revision = whole(session.revision) or 0
-- The record has to be readable: damaged fields are left out of it.
local agent_id = string.match(session.agent_id or '', '^[%x%-]*$') or ''
local website_domain = string.match(session.website_domain or '', '^[%w%.%-:_]*$') or ''
local minted = session.minted == '1' and '1' or '0'
-- The user is erased too, but the tombstone stays a user's: strangers get the same answer as before.
local user_id = (session.user_id or '') ~= '' and 'erased' or ''
redis.call('DEL', session_key, ticket_key)
redis.call('ZREM', live_key, args.session_id)
redis.call('HDEL', logs_key, args.session_id)
redis.call('ZREM', running_key, args.session_id)
local now, tombstone = iso(now_ms()), {}
store(session_key, tombstone, new_session({
  id = session.id, session_id = args.session_id, agent_id = agent_id, channel = '', status = 'erased', user_id = user_id,
  website_domain = website_domain, ip_address = '', user_agent = '', started_at = now, last_activity_at = now,
  ended_at = now, metadata = '{}', minted = minted, revision = revision, hot_ttl_s = 1,
  epoch = current_epoch(epoch_key) or '0',
}))
emit(session_key, outbox_key, bytes_key, tombstone, 'erased')
-- Followers of a turn or the session learn that it is gone.
redis.call('PUBLISH', args.channel, '')
return reply('erased', session.id)
