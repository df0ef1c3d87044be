-- Gives up the turn that holds the session, which is as it was before the turn. A damaged session gets no TTL.
local function give_up(key, running_key, session)
  release(key, running_key, session)
  local last = from_iso(session.last_activity_at)
  if last then set_expiry(key, session.unflushed, '', session.hot_ttl_s, last, now_ms()) end
end
