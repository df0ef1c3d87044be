-- The reply to a caller that gets nothing of this session, because it is damaged or not the caller's; else nil.
local function barred(session)
  local broken = damage(session)
  if broken then return reply('damaged', broken) end
  local refused = refusal(session)
  return refused and reply(refused)
end
