-- Whether a session is in Redis (`session`, nil if not) as of the current epoch: what an older one left may be forgotten.
local function settled(epoch_key, session)
  return session and session.epoch == current_epoch(epoch_key)
end
