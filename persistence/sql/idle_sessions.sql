-- Active sessions without activity for a time, the longest idle first.
-- $1 interval, $2 int (limit)
SELECT session_id
FROM agent_sessions
WHERE status = 'active' AND last_activity_at < now() - $1::interval
ORDER BY last_activity_at
LIMIT $2
