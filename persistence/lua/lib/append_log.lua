-- Appends args.events to a turn's log, and wakes the session's followers.
local function append_log(logs_key, events_key)
  redis.call('XADD', events_key, args.fence .. '-' .. args.last,
    'session', args.session_id, 'first', args.first, 'events', args.events)
  if tonumber(args.keep_from) > 1 then
    redis.call('XTRIM', events_key, 'MINID', args.fence .. '-' .. args.keep_from)
  end
  note_log(logs_key, events_key)
  redis.call('PUBLISH', args.channel, args.turn_id)
end
