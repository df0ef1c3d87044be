-- All fields of a session by name, or nil when there is no such session.
local function load(key)
  local session = pick(key, FIELDS)
  if not session.format and redis.call('EXISTS', key) == 0 then return nil end
  return session
end
