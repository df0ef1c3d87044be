-- Releases the lease of the turn that holds the session.
local function release(key, running_key, session)
  store(key, session, {turn = '', turn_fence = '', turn_lease_until = '', turn_message_id = ''})
  redis.call('ZREM', running_key, session.session_id)
end
