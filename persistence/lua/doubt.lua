#!lua flags=allow-oom
-- Has a session compared with Postgres at its next use, as after an epoch. What was read of it before is not installed.
--
-- KEYS 1 session hash, 2 ticket string
-- ARGV session_id, nonce
-- replies (session_id and nonce follow the word): doubted | absent
local session_key, ticket_key = KEYS[1], KEYS[2]

redis.call('DEL', ticket_key)
if redis.call('EXISTS', session_key) == 0 then return reply('absent') end
redis.call('HSET', session_key, 'epoch', '0')
return reply('doubted')
