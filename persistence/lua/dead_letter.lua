#!lua flags=allow-oom
-- Moves a record that Postgres refuses to the dead stream, with the reason. The session keeps the record in `unflushed`, so
-- it never gets a TTL and stays in Redis. Moving the same record again changes nothing.
--
-- KEYS 1 outbox stream, 2 outbox bytes string, 3 dead stream, 4 session hash
-- ARGV session_id, nonce, group, entry, fact, reason
-- replies (session_id and nonce follow the word)
--   moved  id on the dead stream
--   gone
local outbox_key, bytes_key, dead_key, session_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

local found = redis.call('XRANGE', outbox_key, args.entry, args.entry)
if #found == 0 then return reply('gone') end
local record = found[1][2]
for _, value in ipairs({'reason', args.reason, 'entry', args.entry, 'died_at', iso(now_ms())}) do
  record[#record + 1] = value
end
local dead_entry = redis.call('XADD', dead_key, '*', unpack(record))
dequeue(outbox_key, bytes_key, args.group, args.entry)
if redis.call('EXISTS', session_key) == 1 then
  local dead = redis.call('HGET', session_key, 'dead') or ''
  if dead ~= '' then dead = dead .. ' ' end
  redis.call('HSET', session_key, 'dead', dead .. args.fact .. '@' .. dead_entry)
end
return reply('moved', dead_entry)
