-- Pairs of names and values in a list, from an index on, as a table.
local function named(values, first)
  local found = {}
  for i = first, #values, 2 do found[values[i]] = values[i + 1] end
  return found
end
