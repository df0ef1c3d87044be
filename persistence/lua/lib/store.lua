-- Writes fields to a session's hash, and into the loaded session.
local function store(key, session, fields)
  local flat = {}
  for name, value in pairs(fields) do
    flat[#flat + 1] = name
    flat[#flat + 1] = value
    session[name] = tostring(value)
  end
  redis.call('HSET', key, unpack(flat))
end
