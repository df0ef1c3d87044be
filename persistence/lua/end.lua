#!lua flags=allow-oom
-- Ends a session for good. A running turn loses its lease and will not be committed. Repeating it changes nothing.
--
-- KEYS 1 session hash, 2 outbox stream, 3 outbox bytes string, 4 fence string, 5 running zset, 6 ticket string, 7 epoch hash
-- ARGV session_id, nonce, agent_id ('' any), website_domain ('' any), authorized (1 | 0),
--      user_id ('' none), trusted (1 | 0), ticket_ms, channel
-- replies (session_id and nonce follow the word)
--   ended   header
--   absent  ticket, id
--   erased | foreign | unauthorized
--   damaged field
local session_key, outbox_key, bytes_key, fence_key, running_key, ticket_key, epoch_key =
  KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6], KEYS[7]

local session = load(session_key)
local barrier = unavailable(session, epoch_key, fence_key, ticket_key)
if barrier then return barrier end
if session.status ~= 'ended' then
  store(session_key, session, {status = 'ended', ended_at = iso(now_ms()), waiting = ''})
  release(session_key, running_key, session)
  redis.call('PUBLISH', args.channel, '')
  emit(session_key, outbox_key, bytes_key, session, 'ended')
end
return reply('ended', header(session))
