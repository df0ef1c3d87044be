-- An agent's sessions without activity for a time, after a position in their order, the oldest first.
-- $1 uuid (agent), $2 interval, $3 timestamptz and $4 text (activity and session_id of the position, null: from the
-- beginning), $5 int (limit)
SELECT session_id, last_activity_at
FROM agent_sessions
WHERE agent_id = $1 AND active_in < now() - $2::interval AND last_activity_at < now() - $2::interval
    AND (
        $3::timestamptz IS NULL
        OR active_in > $3 - interval '5 minutes' AND (last_activity_at, session_id COLLATE "C") > ($3, $4)
    )
ORDER BY active_in, last_activity_at, session_id COLLATE "C"
LIMIT $5
