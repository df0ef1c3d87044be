#!lua flags=allow-oom
-- Takes records from an outbox for a worker: its own pending ones, or those of dead workers and then new ones.
--
-- KEYS 1 outbox stream
-- ARGV session_id ('' : the reply is about no session), nonce, group, consumer, count,
--      own (1: what this consumer took and did not acknowledge), claim_idle_ms (0: claim nothing)
-- replies taken, session_id, nonce, entries as {id, {field, value, ...}}, ids that XAUTOCLAIM found deleted
local outbox_key = KEYS[1]
local args = named(ARGV)

local entries, deleted = {}, {}
local function read(from)
  local got = redis.call('XREADGROUP', 'GROUP', args.group, args.consumer, 'COUNT', args.count - #entries,
    'STREAMS', outbox_key, from)
  if got then
    for _, entry in ipairs(got[1][2]) do
      if entry[2] then entries[#entries + 1] = entry end
    end
  end
end
if args.own == '1' then
  read('0')
else
  if args.claim_idle_ms ~= '0' then
    local claimed = redis.call('XAUTOCLAIM', outbox_key, args.group, args.consumer, args.claim_idle_ms, '0-0',
      'COUNT', args.count)
    entries, deleted = claimed[2], claimed[3]
  end
  if #entries < tonumber(args.count) then read('>') end
end
return {'taken', args.session_id, args.nonce, entries, deleted}
