#!lua flags=allow-oom
-- Appends events to the log of a running turn. Only the holder of the fence may. Appending the same events again adds
-- nothing; if Redis has lost its last writes, the reply asks for them again.
--
-- KEYS 1 session hash, 2 logs hash, 3 events stream
-- ARGV session_id, nonce, turn_id, fence, after (number of the last event known to be stored),
--      events (JSON array), first, last (numbers of the first and the last of them), keep_from (number of the oldest event
--      that may stay), log_ttl_ms, channel
-- replies (session_id and nonce follow the word)
--   appended
--   gap       number of the last event stored: append from there
--   lost      the turn no longer holds the session
local session_key, logs_key, events_key = KEYS[1], KEYS[2], KEYS[3]

local held = redis.call('HMGET', session_key, 'turn', 'turn_fence')
if held[1] ~= args.turn_id or held[2] ~= args.fence then return reply('lost') end
local tail = log_tail(events_key)
if tail >= tonumber(args.last) then return reply('appended') end
if tail ~= tonumber(args.after) then return reply('gap', tail) end
append_log(logs_key, events_key)
return reply('appended')
