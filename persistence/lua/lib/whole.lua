-- Text as a whole number that is not negative, as scripts write it, else nil: to Lua 'nan', 'inf' and '1e300' are numbers
-- too.
local function whole(text)
  return text and #text <= 15 and not string.find(text, '%D') and tonumber(text) or nil
end
