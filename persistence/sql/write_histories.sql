-- Writes the whole conversation of sessions that have ended or timed out, again whenever a late turn has arrived.
-- $1 uuid[]
UPDATE agent_sessions
SET conversation_history = coalesce(
    (
        SELECT jsonb_agg(
            jsonb_build_object('role', role, 'content', content, 'created_at', to_char(
                agent_messages.created_at AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.MS"Z"'
            )) ORDER BY seq
        )
        FROM agent_messages WHERE agent_messages.session_id = agent_sessions.id
    ),
    '[]'
)
WHERE id = ANY ($1::uuid[]) AND status IN ('ended', 'timeout')
