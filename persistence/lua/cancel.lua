#!lua flags=allow-oom
-- Cancels the running turn, whichever pod runs it: the session is as it was before, the turn's log ends, and the pod is told.
--
-- KEYS 1 session hash, 2 running zset, 3 logs hash, 4 events stream of the turn
-- ARGV session_id, nonce, turn_id, agent_id ('' any), website_domain ('' any), authorized (1 | 0),
--      user_id ('' none), trusted (1 | 0), log_ttl_ms, channel, control
-- replies (session_id and nonce follow the word)
--   cancelled
--   lost       the turn no longer runs
--   erased | foreign | unauthorized
--   damaged    field
local session_key, running_key, logs_key, events_key = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

local session = load(session_key)
if not session then return reply('lost') end
local barrier = barred(session)
if barrier then return barrier end
if session.turn ~= args.turn_id then return reply('lost') end
end_log(logs_key, events_key, session.turn_fence, '["turn.cancelled",{}]')
give_up(session_key, running_key, session)
redis.call('PUBLISH', args.control, args.turn_id)
return reply('cancelled')
