#!lua
-- Charges turns to a rate limit that is shared by all pods, and tells how far ahead of time it is.
-- Generic cell rate algorithm (ITU-T I.371), kept as one timestamp that expires by itself.
--
-- KEYS 1 limit string
-- ARGV session_id (the bucket's name), nonce, cost (turns), interval_ms (time that one turn costs)
-- replies charged, session_id, nonce, ahead_ms (how far the bucket is charged beyond now)
local limit_key = KEYS[1]
local args = named(ARGV)

local now = now_ms()
local ahead = math.max(tonumber(redis.call('GET', limit_key) or 0) - now, 0) + args.cost * args.interval_ms
redis.call('SET', limit_key, string.format('%d', now + ahead), 'PX', string.format('%d', math.ceil(ahead) + 1))
return {'charged', args.session_id, args.nonce, math.ceil(ahead)}
