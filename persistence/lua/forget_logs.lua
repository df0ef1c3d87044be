#!lua flags=allow-oom
-- Removes the turn logs of a session that is in neither store: it was erased, and Redis has forgotten that.
--
-- KEYS 1 session hash, 2 logs hash, 3 ... events streams of the turns in `logged`
-- ARGV session_id, nonce, logged (ids of the turns with a log that the caller knows of, separated by a space)
-- replies (session_id and nonce follow the word)
--   forgotten
--   kept       the session is there
--   logs       the right value of `logged`: call again with it and its keys
local session_key, logs_key = KEYS[1], KEYS[2]
local events_keys = {}
for i = 3, #KEYS do events_keys[i - 2] = KEYS[i] end

if redis.call('EXISTS', session_key) == 1 then return reply('kept') end
local turn_ids = {}
for index, one in ipairs(live_logs(logs_key, args.session_id, now_ms())) do turn_ids[index] = one[1] end
local logged = table.concat(turn_ids, ' ')
if logged ~= args.logged then return reply('logs', logged) end
for index in ipairs(events_keys) do redis.call('DEL', events_keys[index]) end
redis.call('HDEL', logs_key, args.session_id)
return reply('forgotten')
