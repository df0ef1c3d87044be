-- A session's list of unflushed records with one more: `fact@entry`, separated by spaces.
local function with_unflushed(unflushed, fact, entry)
  return (unflushed == '' and '' or unflushed .. ' ') .. fact .. '@' .. entry
end
