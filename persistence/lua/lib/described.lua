-- A session as JSON, as a record carries it. Numbers and objects are stored as JSON already.
local function described(session)
  local members = {}
  for i = 2, #HEADER do
    local name = HEADER[i]
    local value, kind = session[name], KINDS[name]
    if kind == 'flag' then
      value = value == '1' and 'true' or 'false'
    elseif kind ~= 'whole' and kind ~= 'object' then
      value = cjson.encode(value)
    end
    members[#members + 1] = '"' .. name .. '":' .. value
  end
  return '{' .. table.concat(members, ',') .. '}'
end
