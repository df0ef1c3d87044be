#!lua
-- Installs a session that was read from Postgres, under the ticket that was given before the reading began. A process
-- that stalled in between holds a ticket that is used, replaced or expired, and installs nothing.
--
-- KEYS 1 session hash, 2 live zset, 3 ticket string
-- ARGV session_id, nonce, ticket, hot_ttl_s, first_hot, and one field:<name> for each field of HEADER and each t:<n>
-- replies (each followed by session_id and nonce): hydrated | stale
local session_key, live_key, ticket_key = KEYS[1], KEYS[2], KEYS[3]
local args = named(ARGV)
local function reply(word) return {word, args.session_id, args.nonce} end

if redis.call('GET', ticket_key) ~= args.ticket or redis.call('EXISTS', session_key) == 1 then return reply('stale') end
local fields = {}
for name, value in pairs(args) do
  local field = string.match(name, '^field:(.+)$')
  if field then fields[field] = value end
end
for _, name in ipairs(STATE) do fields[name] = '' end
fields.format, fields.hot_ttl_s, fields.first_hot, fields.flushed = '1', args.hot_ttl_s, args.first_hot, fields.turns
local session = {}
store(session_key, session, fields)
-- Someone is about to use it: it stays for a whole idle time, unless what follows decides otherwise.
redis.call('PEXPIRE', session_key, args.hot_ttl_s * 1000)
redis.call('ZADD', live_key, from_iso(session.last_activity_at), args.session_id)
redis.call('DEL', ticket_key)
return reply('hydrated')
