#!lua
-- Tries what every turn needs: a write, and a publication.
--
-- KEYS 1 probe string
-- ARGV session_id ('' : no session), nonce, channel, life_ms
-- replies (session_id and nonce follow the word): written
local probe_key = KEYS[1]

redis.call('SET', probe_key, '', 'PX', args.life_ms)
redis.call('PUBLISH', args.channel, '')
return reply('written')
