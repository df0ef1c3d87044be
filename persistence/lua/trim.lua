#!lua flags=allow-oom
-- Removes sessions that are no longer in Redis from the list of live sessions.
--
-- KEYS 1 live zset, 2 ... session hashes
-- ARGV session_id ('' : several sessions), nonce, session_ids (separated by a space, in the order of the keys)
-- replies (session_id and nonce follow the word)
--   trimmed  how many
local live_key = KEYS[1]
local session_keys = {}
for i = 2, #KEYS do session_keys[i - 1] = KEYS[i] end

local trimmed, index = 0, 0
for session_id in string.gmatch(args.session_ids, '%S+') do
  index = index + 1
  if redis.call('EXISTS', session_keys[index]) == 0 then
    trimmed = trimmed + redis.call('ZREM', live_key, session_id)
  end
end
return reply('trimmed', trimmed)
