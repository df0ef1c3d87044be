#!lua flags=allow-oom
-- Leaves records that a worker has taken to the next one that claims: they stay pending, for a consumer that nobody is.
--
-- KEYS 1 outbox stream
-- ARGV session_id ('' : the reply is about no session), nonce, group, entries (ids, separated by a space), idle_ms (for how
--      long nobody is said to have asked for them)
-- replies (each followed by session_id and nonce): left
local outbox_key = KEYS[1]
local args = named(ARGV)

for entry in string.gmatch(args.entries, '%S+') do
  redis.call('XCLAIM', outbox_key, args.group, 'nobody', 0, entry, 'IDLE', args.idle_ms, 'JUSTID')
end
return {'left', args.session_id, args.nonce}
