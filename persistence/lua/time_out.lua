#!lua flags=allow-oom
-- Marks a session as timed out after idle_ms without activity. A visitor who comes back makes it active again.
--
-- KEYS 1 session hash, 2 outbox stream, 3 outbox bytes string, 4 fence string, 5 ticket string, 6 epoch hash
-- ARGV session_id, nonce, idle_ms, ticket_ms
-- replies (session_id and nonce follow the word)
--   timed_out | kept
--   absent  ticket, id
--   damaged field
local session_key, outbox_key, bytes_key, fence_key, ticket_key, epoch_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5], KEYS[6]

local session = load(session_key)
if not session then return absent(epoch_key, fence_key, ticket_key) end
local broken = damage(session)
if broken then return reply('damaged', broken) end
if session.epoch ~= current_epoch(epoch_key) then return absent(epoch_key, fence_key, ticket_key, session) end
local now = now_ms()
local idle_ms = now - from_iso(session.last_activity_at)
if session.status ~= 'active' or session.turn ~= '' or idle_ms < tonumber(args.idle_ms) then return reply('kept') end
store(session_key, session, {status = 'timeout', ended_at = iso(now)})
emit(session_key, outbox_key, bytes_key, session, 'timeout')
return reply('timed_out')
