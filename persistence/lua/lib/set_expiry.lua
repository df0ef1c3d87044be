-- The one rule of the hot store: a TTL if, and only if, all of the session is in Postgres and no turn runs on it.
-- `last_activity_ms` is the time of the session's last activity.
local function set_expiry(key, unflushed, turn, hot_ttl_s, last_activity_ms, now)
  if unflushed ~= '' or turn ~= '' then
    redis.call('PERSIST', key)
    return
  end
  -- After a clock was set back the last activity may lie ahead of it.
  local left = hot_ttl_s * 1000 - math.max(now - last_activity_ms, 0)
  redis.call('PEXPIRE', key, string.format('%d', math.max(left, 1000)))
end
