-- The number of the last event in a turn's log, 0 when the log is empty. An entry holds some events, numbered without
-- gaps, as `session` (their session), `first` (the number of the first) and `events` (a JSON array); its id
-- `<fence>-<number of the last>` is the cursor of the last one.
local function log_tail(events_key)
  local tail = redis.call('XREVRANGE', events_key, '+', '-', 'COUNT', 1)
  return tail[1] and tonumber(string.match(tail[1][1], '%-(%d+)$')) or 0
end
