-- The reply for a session that is not in Redis: a ticket to install what Postgres has of it. All callers share one ticket
-- while it is absent, because Postgres learns nothing new about it in that time. Installing or creating the session uses
-- the ticket up, so that nothing that was read before can be installed afterwards.
local function absent(fence_key, ticket_key)
  local ticket = tonumber(redis.call('GET', ticket_key) or redis.call('INCR', fence_key))
  redis.call('SET', ticket_key, ticket, 'PX', args.ticket_ms)
  return reply('absent', ticket)
end
