#!lua flags=allow-oom
-- Gives up a turn whose lease has expired: its pod is dead or stalled, and will not commit.
--
-- KEYS 1 session hash, 2 running zset
-- ARGV session_id, nonce, channel
-- replies (session_id and nonce follow the word)
--   reaped  turn_id
--   kept    the lease is valid, or no turn runs
local session_key, running_key = KEYS[1], KEYS[2]

local session = load(session_key)
if not session or misplaced(session) or session.turn == '' then
  redis.call('ZREM', running_key, args.session_id)
  return reply('kept')
end
local turn_id = session.turn
if lease_left(session_key, running_key, session, now_ms()) > 0 then return reply('kept') end
give_up(session_key, running_key, session)
redis.call('PUBLISH', args.channel, turn_id)
return reply('reaped', turn_id)
