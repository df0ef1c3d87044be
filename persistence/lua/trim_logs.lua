#!lua flags=allow-oom
-- Takes sessions off the list of logs whose logs have all expired.
--
-- KEYS 1 logs hash
-- ARGV session_id ('' : the reply is about several), nonce, session_ids (separated by a space)
-- replies trimmed, session_id, nonce, how many
local logs_key = KEYS[1]
local args = named(ARGV)

local now, trimmed = now_ms(), 0
for session_id in string.gmatch(args.session_ids, '%S+') do
  if #live_logs(logs_key, session_id, now) == 0 then trimmed = trimmed + redis.call('HDEL', logs_key, session_id) end
end
return {'trimmed', args.session_id, args.nonce, trimmed}
