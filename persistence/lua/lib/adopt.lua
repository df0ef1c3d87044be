-- Gives an anonymous session to the user who comes with a verified user token, for good. A record of its own tells
-- Postgres, whatever becomes of the turn.
local function adopt(key, outbox_key, bytes_key, session)
  if session.user_id ~= '' or args.user_id == '' then return end
  store(key, session, {user_id = args.user_id})
  emit(key, outbox_key, bytes_key, session, 'opened')
end
