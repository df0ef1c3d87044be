-- The fields of a new session: these, and what every new session starts with.
local function new_session(fields)
  local session = INITIAL
  for name, value in pairs(fields) do session[name] = value end
  return session
end
