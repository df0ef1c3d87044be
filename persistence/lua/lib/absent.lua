-- The reply for a session that is not in Redis, or is there as of an older epoch (`session`, else nil): a ticket to install
-- what Postgres has of it, and the id of what Redis has. All callers share one ticket while it is absent, because Postgres
-- learns nothing new about it in that time. Installing or creating the session uses the ticket up, so that nothing that was
-- read before can be installed afterwards.
local function absent(epoch_key, fence_key, ticket_key, session)
  if not current_epoch(epoch_key) then return reply('unsettled') end
  local ticket = tonumber(redis.call('GET', ticket_key) or redis.call('INCR', fence_key))
  redis.call('SET', ticket_key, ticket, 'PX', args.ticket_ms)
  return reply('absent', ticket, session and session.id or '')
end
