#!lua
-- Installs a session that was read from Postgres, under the ticket that was given before it was read. A process that stalled
-- in between has a ticket that is used up, replaced or expired, and installs nothing. It takes the place of a session of an
-- older epoch, if Postgres has all of that: the running turn, those that wait, the rate limit and dead letters stay.
--
-- KEYS 1 session hash, 2 live zset, 3 ticket string, 4 epoch hash, 5 running zset
-- ARGV session_id, nonce, ticket, hot_ttl_s, first_hot, ... (fields of the hash: name, value, name, value ...)
-- replies (session_id and nonce follow the word): hydrated | stale
--   unsettled
--   damaged    field
local session_key, live_key, ticket_key, epoch_key, running_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local stored = named(ARGV, 6)

if redis.call('GET', ticket_key) ~= args.ticket then return reply('stale') end
local epoch = current_epoch(epoch_key)
if not epoch then return reply('unsettled') end
local held = load(session_key)
local kept = {}
if held then
  if held.epoch == epoch then return reply('stale') end
  local broken = damage(held)
  if broken then return reply('damaged', broken) end
  local dead = redis.call('HGET', session_key, 'dead')
  if waiting_records(held, dead or '') > 0 then return reply('stale') end
  for _, name in ipairs({'unflushed', 'rate_tat_ms', 'turn', 'turn_fence', 'turn_lease_until', 'turn_message_id', 'waiting'}) do
    kept[name] = held[name]
  end
  kept.dead = dead or nil
  redis.call('DEL', session_key)
end
local fields, session = new_session(stored), {}
for name, value in pairs(kept) do fields[name] = value end
if fields.status == 'ended' and fields.turn ~= '' then
  fields.turn, fields.turn_fence, fields.turn_lease_until, fields.turn_message_id, fields.waiting = '', '', '', '', ''
  redis.call('ZREM', running_key, args.session_id)
end
fields.hot_ttl_s, fields.first_hot, fields.flushed, fields.epoch = args.hot_ttl_s, args.first_hot, fields.turns, epoch
store(session_key, session, fields)
-- It is about to be used, so it stays for a whole idle time, unless what follows sets another.
if session.turn == '' and session.unflushed == '' then redis.call('PEXPIRE', session_key, args.hot_ttl_s * 1000) end
redis.call('ZADD', live_key, from_iso(session.last_activity_at), args.session_id)
redis.call('DEL', ticket_key)
return reply('hydrated')
