#!lua flags=allow-oom
-- Tells a worker where to read on in an outbox: first its own pending records (taken and not acknowledged, whether for an
-- error, a restart or a lost reply); without any, dead workers' records and new ones. Pending records up to `after` are
-- skipped: the worker has them in hand. It reads the records beside this script (outbox.py): through Lua it takes Redis four
-- times as long.
--
-- KEYS 1 outbox stream, 2 epoch hash
-- ARGV session_id ('' : no session), nonce, group, consumer, count, claim_idle_ms (0: claim nothing),
--      after (an entry's id, 0: nothing is in hand)
-- replies (session_id and nonce follow the word)
--   pending  ids that XAUTOCLAIM found deleted, epoch (0: none): the consumer has records behind `after`
--   new      the same: the outbox may have records that no consumer has
--   nothing  the same
local outbox_key, epoch_key = KEYS[1], KEYS[2]

local function pending()
  local from = args.after == '0' and '-' or '(' .. args.after
  return redis.pcall('XPENDING', outbox_key, args.group, from, '+', 1, args.consumer)
end
local held, deleted = pending(), {}
if held.err and string.find(held.err, 'NOGROUP') then
  -- Redis has come back empty.
  redis.call('XGROUP', 'CREATE', outbox_key, args.group, '0', 'MKSTREAM')
  held = pending()
end
if held.err then return held end
if args.claim_idle_ms ~= '0' then
  -- Its own too: deleted entries would be pending for ever.
  local claimed = redis.call('XAUTOCLAIM', outbox_key, args.group, args.consumer, args.claim_idle_ms, '0-0',
    'COUNT', args.count, 'JUSTID')
  held, deleted = pending(), claimed[3]
end
local word = #held > 0 and 'pending' or redis.call('XLEN', outbox_key) > 0 and 'new' or 'nothing'
return reply(word, deleted, whole(current_epoch(epoch_key)) or 0)
