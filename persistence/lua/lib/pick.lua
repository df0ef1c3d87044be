-- Some fields of a session by name. A missing one has its default, and is false without one.
local function pick(key, names)
  local session, values = {key = key}, redis.call('HMGET', key, unpack(names))
  for i = 1, #names do
    local name = names[i]
    session[name] = values[i] or DEFAULTS[name] or false
  end
  return session
end
