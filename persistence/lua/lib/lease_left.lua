-- How long the lease of the running turn still holds, in ms. More than it was given for means that the clock was set back
-- since: it is shortened to that.
local function lease_left(key, running_key, session, now)
  if session.turn == '' then return 0 end
  local left, given = from_iso(session.turn_lease_until) - now, whole(session.lease_ms) or 0
  if given > 0 and left > given then
    left = given
    store(key, session, {turn_lease_until = iso(now + left)})
    redis.call('ZADD', running_key, now + left, args.session_id)
  end
  return left
end
