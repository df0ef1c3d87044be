-- The reply to a caller that gets nothing of a session: it is not in Redis, damaged, there as of an older epoch, or not the
-- caller's; else nil.
local function unavailable(session, epoch_key, fence_key, ticket_key)
  if not session then return absent(epoch_key, fence_key, ticket_key) end
  local broken = damage(session)
  if broken then return reply('damaged', broken) end
  if session.epoch ~= current_epoch(epoch_key) then return absent(epoch_key, fence_key, ticket_key, session) end
  local refused = refusal(session)
  return refused and reply(refused)
end
