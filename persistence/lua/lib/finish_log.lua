-- Ends a log together with its turn: appends the missing events, if the turn streams, and wakes the session's followers.
local function finish_log(logs_key, events_key)
  if args.events == '' then
    redis.call('PUBLISH', args.channel, args.turn_id)
  elseif log_tail(events_key) < tonumber(args.last) then
    append_log(logs_key, events_key)
  end
end
