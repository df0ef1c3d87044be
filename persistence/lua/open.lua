#!lua
-- Creates a session, or hands back the one that is there. An id that a browser made up may be in Postgres, so it needs
-- a ticket given before Postgres was asked; an id that the gateway has just minted does not.
--
-- KEYS 1 session hash, 2 outbox stream, 3 outbox bytes string, 4 fence string, 5 live zset, 6 ticket string
-- ARGV session_id, nonce, id (uuid), agent_id, website_domain, authorized (1 | 0),
--      user_id ('' none), trusted (1 | 0), channel, ip_address, user_agent, metadata (JSON object), minted (1 | 0),
--      hot_ttl_s, ticket ('' none), ticket_ms, max_backlog, max_backlog_bytes
-- replies (each followed by session_id and nonce)
--   opened | found   header
--   absent           ticket: ask Postgres, then open again under it
--   erased | foreign | unauthorized | backlog_full
--   damaged          field
local session_key, outbox_key, bytes_key, fence_key, live_key, ticket_key =
  KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]
local args = named(ARGV)
local function reply(word, ...) return {word, args.session_id, args.nonce, ...} end

local session = load(session_key)
if session then
  local broken = damage(session)
  if broken then return reply('damaged', broken) end
  -- A repeated call whose first reply was lost finds what it opened itself, and needs no token for it.
  local refused = refusal(session, args)
  if refused and not (refused == 'unauthorized' and session.id == args.id) then return reply(refused) end
  if session.status ~= 'ended' and session.user_id == '' and args.user_id ~= '' then
    if backlog_full(outbox_key, bytes_key, args) then return reply('backlog_full') end
    adopt(session_key, outbox_key, bytes_key, session, args)
  end
  return reply(session.id == args.id and 'opened' or 'found', header(session))
end
if args.minted ~= '1' and (args.ticket == '' or redis.call('GET', ticket_key) ~= args.ticket) then
  return absent(fence_key, ticket_key, args)
end
if backlog_full(outbox_key, bytes_key, args) then return reply('backlog_full') end

local now = now_ms()
session = {}
store(session_key, session, {
  format = '1', id = args.id, session_id = args.session_id, agent_id = args.agent_id, channel = args.channel,
  status = 'active', user_id = args.user_id, website_domain = args.website_domain, ip_address = args.ip_address,
  user_agent = args.user_agent, started_at = iso(now), last_activity_at = iso(now), ended_at = '',
  message_count = 0, context = '{}', metadata = args.metadata, minted = args.minted, turns = 0, revision = 0,
  first_hot = 1, flushed = 0, unflushed = '', hot_ttl_s = args.hot_ttl_s, turn = '', turn_fence = '',
  turn_lease_until = '', turn_message_id = '', waiting = '', rate_tat_ms = '',
})
emit(session_key, outbox_key, bytes_key, session, 'opened')
redis.call('ZADD', live_key, now, args.session_id)
redis.call('DEL', ticket_key)
return reply('opened', header(session))
