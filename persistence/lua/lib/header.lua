-- The session's HEADER as a list, for a reply.
local function header(session)
  local values = {}
  for i, name in ipairs(HEADER) do values[i] = session[name] end
  return values
end
