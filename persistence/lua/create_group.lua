#!lua flags=allow-oom
-- Makes the consumer group of an outbox; harmless when it is there.
--
-- KEYS 1 outbox stream
-- ARGV session_id ('' : the reply is about no session), nonce, group
-- replies (each followed by session_id and nonce): created
local outbox_key = KEYS[1]
local args = named(ARGV)

local made = redis.pcall('XGROUP', 'CREATE', outbox_key, args.group, '0', 'MKSTREAM')
if made.err and not string.find(made.err, 'BUSYGROUP') then return made end
return {'created', args.session_id, args.nonce}
