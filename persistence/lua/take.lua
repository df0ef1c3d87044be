#!lua flags=allow-oom
-- Takes records from an outbox for a worker: first what this consumer took and did not acknowledge, whatever the reason (an
-- error, a restart, a reply that was lost); when there is nothing of that, what dead workers left, and new ones. What it took
-- up to an entry, and has in hand, is passed over.
--
-- KEYS 1 outbox stream
-- ARGV session_id ('' : the reply is about no session), nonce, group, consumer, count, claim_idle_ms (0: claim nothing), after
--      (an entry's id; 0: nothing is in hand)
-- replies taken, session_id, nonce, entries as {id, {field, value, ...}}, ids that XAUTOCLAIM found deleted
local outbox_key = KEYS[1]
local args = named(ARGV)

local entries, deleted = {}, {}
local function read(from)
  local function group()
    return redis.pcall('XREADGROUP', 'GROUP', args.group, args.consumer, 'COUNT', args.count - #entries,
      'STREAMS', outbox_key, from)
  end
  local got = group()
  if got and got.err and string.find(got.err, 'NOGROUP') then
    -- A Redis that has come back empty.
    redis.call('XGROUP', 'CREATE', outbox_key, args.group, '0', 'MKSTREAM')
    got = group()
  end
  if got and got.err then return got end
  for _, entry in ipairs(got and got[1][2] or {}) do
    if entry[2] then entries[#entries + 1] = entry end
  end
end

local failed = read(args.after)
if not failed and #entries == 0 then
  if args.claim_idle_ms ~= '0' then
    local claimed = redis.call('XAUTOCLAIM', outbox_key, args.group, args.consumer, args.claim_idle_ms, '0-0',
      'COUNT', args.count)
    entries, deleted = claimed[2], claimed[3]
  end
  if #entries < tonumber(args.count) then failed = read('>') end
end
if failed then return failed end
return {'taken', args.session_id, args.nonce, entries, deleted}
