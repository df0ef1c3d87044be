-- Puts a record about the session, other than a turn, on the outbox. The hash has been written in the same script: both
-- change or neither.
local function emit(key, outbox_key, bytes_key, session, word)
  session.revision = string.format('%d', session.revision + 1)
  local fact = word .. ':' .. session.revision
  local entry = enqueue(outbox_key, bytes_key, record(session.session_id, fact, described(session), ''))
  store(key, session, {revision = session.revision, unflushed = with_unflushed(session.unflushed, fact, entry)})
  redis.call('PERSIST', key)
end
