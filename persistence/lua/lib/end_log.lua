-- Ends a log from outside with one more event. A turn without stored events gets a log of this one.
local function end_log(logs_key, events_key, fence, event)
  local last = string.format('%d', log_tail(events_key) + 1)
  redis.call('XADD', events_key, fence .. '-' .. last,
    'session', args.session_id, 'first', last, 'events', '[' .. event .. ']')
  note_log(logs_key, events_key)
  redis.call('PUBLISH', args.channel, args.turn_id)
end
