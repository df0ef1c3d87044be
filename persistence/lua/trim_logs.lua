#!lua flags=allow-oom
-- Removes sessions whose turn logs have all expired from the list of logs.
--
-- KEYS 1 logs hash
-- ARGV session_id ('' : several sessions), nonce, session_ids (separated by a space)
-- replies (session_id and nonce follow the word)
--   trimmed  how many
local logs_key = KEYS[1]

local now, trimmed = now_ms(), 0
for session_id in string.gmatch(args.session_ids, '%S+') do
  if #live_logs(logs_key, session_id, now) == 0 then trimmed = trimmed + redis.call('HDEL', logs_key, session_id) end
end
return reply('trimmed', trimmed)
