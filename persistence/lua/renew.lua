#!lua flags=allow-oom
-- Renews the lease of a running turn.
--
-- KEYS 1 session hash, 2 running zset
-- ARGV session_id, nonce, turn_id, fence, lease_ms
-- replies (session_id and nonce follow the word): renewed | lost
local session_key, running_key = KEYS[1], KEYS[2]

local held = redis.call('HMGET', session_key, 'turn', 'turn_fence')
if held[1] ~= args.turn_id or held[2] ~= args.fence then return reply('lost') end
local lease_until = now_ms() + args.lease_ms
redis.call('HSET', session_key, 'turn_lease_until', iso(lease_until))
redis.call('ZADD', running_key, lease_until, args.session_id)
return reply('renewed')
