-- The turns numbered from first to last, for a reply; a missing one is false.
local function hot_turns(key, first, last)
  local turns = {}
  for chunk = first, last, 500 do
    local names = {}
    for n = chunk, math.min(chunk + 499, last) do names[n - chunk + 1] = 't:' .. n end
    local some = redis.call('HMGET', key, unpack(names))
    if last - first < 500 then return some end
    for _, turn in ipairs(some) do turns[#turns + 1] = turn end
  end
  return turns
end

-- The log of a turn is a stream. An entry holds some events, numbered without gaps, as `session` (whose they are),
-- `first` (the number of the first) and `events` (a JSON array); its id is `<fence>-<number of the last>`, which is the
-- last one's cursor.
