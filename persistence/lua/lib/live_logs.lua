-- The turn logs of a session that have not expired, as {turn_id, until_ms}. They are kept apart from the session, which
-- may leave Redis and come back while they exist.
local function live_logs(logs_key, session_id, now)
  local logs = {}
  for turn_id, until_ms in string.gmatch(redis.call('HGET', logs_key, session_id) or '', '([^@ ]+)@(%d+)') do
    if tonumber(until_ms) > now then logs[#logs + 1] = {turn_id, until_ms} end
  end
  return logs
end
