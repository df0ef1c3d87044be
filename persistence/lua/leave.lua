#!lua flags=allow-oom
-- Leaves records that a worker has taken to the next one that claims: they stay pending, for a consumer that no worker is.
--
-- KEYS 1 outbox stream
-- ARGV session_id ('' : no session), nonce, group, entries (ids, separated by a space), idle_ms (their idle time from now on)
-- replies (session_id and nonce follow the word): left
local outbox_key = KEYS[1]

for entry in string.gmatch(args.entries, '%S+') do
  redis.call('XCLAIM', outbox_key, args.group, 'nobody', 0, entry, 'IDLE', args.idle_ms, 'JUSTID')
end
return reply('left')
