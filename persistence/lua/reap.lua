#!lua flags=allow-oom
-- Lets go of a turn whose lease ran out: its pod is dead or stalled, and will not commit.
--
-- KEYS 1 session hash, 2 running zset
-- ARGV session_id, nonce, channel
-- replies (each followed by session_id and nonce)
--   reaped  turn_id
--   kept    the lease is good, or nothing ran
local session_key, running_key = KEYS[1], KEYS[2]
local args = named(ARGV)
local function reply(word, ...) return {word, args.session_id, args.nonce, ...} end

local session = load(session_key)
if not session or confusion(session) or session.turn == '' then
  redis.call('ZREM', running_key, args.session_id)
  return reply('kept')
end
local turn_id = session.turn
if from_iso(session.turn_lease_until) > now_ms() then return reply('kept') end
give_up(session_key, running_key, session)
redis.call('PUBLISH', args.channel, turn_id)
return reply('reaped', turn_id)
