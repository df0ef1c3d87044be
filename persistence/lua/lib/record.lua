-- A record: a fact about a session, the session as JSON, and the turn as JSON or ''.
local function record(session_id, fact, described, turn)
  return {'format', RECORD_FORMAT, 'session_id', session_id, 'fact', fact, 'session', described, 'turn', turn}
end
