-- Checks all fields of a session; returns the first one that is missing or unreadable, else nil. Damage is never taken for
-- absence.
local function damage(session)
  local broken = misplaced(session)
  if broken then return broken end
  local uuid = '^%x%x%x%x%x%x%x%x%-%x%x%x%x%-%x%x%x%x%-%x%x%x%x%-%x%x%x%x%x%x%x%x%x%x%x%x$'
  local readers = {
    uuid = function(text) return string.match(text, uuid) end,
    moment = from_iso,
    whole = whole,
    flag = function(text) return text == '0' or text == '1' end,
  }
  for _, name in ipairs(FIELDS) do
    local text = session[name]
    if not text then return name end
    local kind, optional = string.match(KINDS[name] or '', '^(%a+)(%??)$')
    local read = readers[kind]
    if read and not (text == '' and optional == '?') and not read(text) then return name end
  end
  if session.agent_id == '' and session.status ~= 'erased' then return 'agent_id' end
  if tonumber(session.flushed) > tonumber(session.turns) then return 'flushed' end
  return nil
end
