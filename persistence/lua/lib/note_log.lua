-- Registers a turn's log, whose TTL begins anew, so that erasing the session finds it.
local function note_log(logs_key, events_key)
  local now = now_ms()
  local noted = args.turn_id .. '@' .. string.format('%d', now + args.log_ttl_ms)
  for _, one in ipairs(live_logs(logs_key, args.session_id, now)) do
    if one[1] ~= args.turn_id then noted = one[1] .. '@' .. one[2] .. ' ' .. noted end
  end
  redis.call('HSET', logs_key, args.session_id, noted)
  redis.call('PEXPIRE', events_key, args.log_ttl_ms)
end
