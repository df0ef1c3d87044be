#!lua flags=allow-oom
-- Says where a worker reads on in an outbox: first what this consumer took and did not acknowledge, whatever the reason (an
-- error, a restart, a reply that was lost); when there is nothing of that, what dead workers left, and new records. What it took
-- up to an entry, and has in hand, is passed over. The records are read beside this script (outbox.py): through Lua it takes
-- Redis four times as long.
--
-- KEYS 1 outbox stream
-- ARGV session_id ('' : the reply is about no session), nonce, group, consumer, count, claim_idle_ms (0: claim nothing), after
--      (an entry's id; 0: nothing is in hand)
-- replies pending, session_id, nonce, ids that XAUTOCLAIM found deleted: the consumer has records behind `after`
--         new, the same: there may be some that nobody has
--         nothing, the same
local outbox_key = KEYS[1]
local args = named(ARGV)

local function pending()
  local from = args.after == '0' and '-' or '(' .. args.after
  return redis.pcall('XPENDING', outbox_key, args.group, from, '+', 1, args.consumer)
end
local held, deleted = pending(), {}
if held.err and string.find(held.err, 'NOGROUP') then
  -- A Redis that has come back empty.
  redis.call('XGROUP', 'CREATE', outbox_key, args.group, '0', 'MKSTREAM')
  held = pending()
end
if held.err then return held end
if args.claim_idle_ms ~= '0' then
  -- Its own too: those that were deleted would be pending for ever.
  local claimed = redis.call('XAUTOCLAIM', outbox_key, args.group, args.consumer, args.claim_idle_ms, '0-0',
    'COUNT', args.count, 'JUSTID')
  held, deleted = pending(), claimed[3]
end
local word = #held > 0 and 'pending' or redis.call('XLEN', outbox_key) > 0 and 'new' or 'nothing'
return {word, args.session_id, args.nonce, deleted}
