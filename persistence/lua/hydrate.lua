#!lua
-- Installs a session that was read from Postgres, under the ticket that was given before it was read. A process that stalled
-- in between has a ticket that is used up, replaced or expired, and installs nothing.
--
-- KEYS 1 session hash, 2 live zset, 3 ticket string
-- ARGV session_id, nonce, ticket, hot_ttl_s, first_hot, ... (fields of the hash: name, value, name, value ...)
-- replies (session_id and nonce follow the word): hydrated | stale
local session_key, live_key, ticket_key = KEYS[1], KEYS[2], KEYS[3]
local stored = named(ARGV, 6)

if redis.call('GET', ticket_key) ~= args.ticket or redis.call('EXISTS', session_key) == 1 then return reply('stale') end
local fields, session = new_session(stored), {}
fields.hot_ttl_s, fields.first_hot, fields.flushed = args.hot_ttl_s, args.first_hot, fields.turns
store(session_key, session, fields)
-- It is about to be used, so it stays for a whole idle time, unless what follows sets another.
redis.call('PEXPIRE', session_key, args.hot_ttl_s * 1000)
redis.call('ZADD', live_key, from_iso(session.last_activity_at), args.session_id)
redis.call('DEL', ticket_key)
return reply('hydrated')
