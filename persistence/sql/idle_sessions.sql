-- Active sessions without activity for a time, after a position in their order, the longest idle first.
-- $1 interval, $2 timestamptz and $3 text (activity and session_id of the position, null: from the beginning),
-- $4 int (limit)
SELECT session_id, last_activity_at
FROM agent_sessions
WHERE status = 'active' AND active_in < now() - $1::interval AND last_activity_at < now() - $1::interval
    AND (
        $2::timestamptz IS NULL
        OR active_in > $2 - interval '5 minutes' AND (last_activity_at, session_id COLLATE "C") > ($2, $3)
    )
ORDER BY active_in, last_activity_at, session_id COLLATE "C"
LIMIT $4
