#!lua
-- Creates a session, or returns the existing one. A session id made by a browser may be in Postgres, so it needs a ticket
-- given before Postgres was asked; one that the gateway has just minted does not.
--
-- KEYS 1 session hash, 2 outbox stream, 3 outbox bytes string, 4 fence string, 5 live zset, 6 ticket string, 7 epoch hash
-- ARGV session_id, nonce, id (uuid), agent_id, website_domain, authorized (1 | 0),
--      user_id ('' none), trusted (1 | 0), channel, ip_address, user_agent, metadata (JSON object), minted (1 | 0),
--      hot_ttl_s, ticket ('' none), ticket_ms, max_backlog, max_backlog_bytes
-- replies (session_id and nonce follow the word)
--   opened | found   header
--   absent           ticket, id: ask Postgres, then open again under it
--   erased | foreign | unauthorized | backlog_full
--   damaged          field
local session_key, outbox_key, bytes_key, fence_key, live_key, ticket_key, epoch_key =
  KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]

local session = load(session_key)
if session then
  local broken = damage(session)
  if broken then return reply('damaged', broken) end
  if session.epoch ~= current_epoch(epoch_key) then return absent(epoch_key, fence_key, ticket_key, session) end
  -- A call that is repeated because its reply was lost finds its own session, and needs no token for it.
  local refused = refusal(session)
  if refused and not (refused == 'unauthorized' and session.id == args.id) then return reply(refused) end
  if session.status ~= 'ended' and session.user_id == '' and args.user_id ~= '' then
    if backlog_full(outbox_key, bytes_key) then return reply('backlog_full') end
    adopt(session_key, outbox_key, bytes_key, session)
  end
  return reply(session.id == args.id and 'opened' or 'found', header(session))
end
if args.minted ~= '1' and (args.ticket == '' or redis.call('GET', ticket_key) ~= args.ticket) then
  return absent(epoch_key, fence_key, ticket_key)
end
local epoch = current_epoch(epoch_key)
if not epoch then return reply('unsettled') end
if backlog_full(outbox_key, bytes_key) then return reply('backlog_full') end

local now = now_ms()
session = {}
store(session_key, session, new_session({
  id = args.id, session_id = args.session_id, agent_id = args.agent_id, channel = args.channel, user_id = args.user_id,
  website_domain = args.website_domain, ip_address = args.ip_address, user_agent = args.user_agent, started_at = iso(now),
  last_activity_at = iso(now), metadata = args.metadata, minted = args.minted, hot_ttl_s = args.hot_ttl_s, epoch = epoch,
}))
emit(session_key, outbox_key, bytes_key, session, 'opened')
redis.call('ZADD', live_key, now, args.session_id)
redis.call('DEL', ticket_key)
return reply('opened', header(session))
