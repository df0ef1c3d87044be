-- Checks the fields that locate turns and lease; returns the first broken one, else nil. `session` has at least these
-- fields.
local function misplaced(session)
  if session.format ~= FORMAT then return 'format' end
  local turns, first_hot = whole(session.turns), whole(session.first_hot)
  if not turns then return 'turns' end
  if not first_hot or first_hot < 1 or first_hot > turns + 1 then return 'first_hot' end
  local hot_ttl_s = whole(session.hot_ttl_s)
  if not hot_ttl_s or hot_ttl_s < 1 then return 'hot_ttl_s' end
  local key = session.key
  if turns - first_hot + 1 > redis.call('HLEN', key) then return 'turns' end
  if session.minted ~= '0' and session.minted ~= '1' then return 'minted' end
  for _, name in ipairs({'turn', 'turn_fence', 'turn_lease_until'}) do
    if not session[name] then return name end
  end
  if session.turn ~= '' then
    if not whole(session.turn_fence) then return 'turn_fence' end
    if not from_iso(session.turn_lease_until) then return 'turn_lease_until' end
  end
  if not session.rate_tat_ms or session.rate_tat_ms ~= '' and not string.match(session.rate_tat_ms, '^%d+%.?%d*$') then
    return 'rate_tat_ms'
  end
  local tail = ':session:' .. (session.session_id or '')
  if string.sub(key, -#tail) ~= tail then return 'session_id' end
  return nil
end
