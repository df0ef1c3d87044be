-- Totals over an agent's stored sessions without some that are counted in Redis.
-- $1 uuid (null: every agent), $2 text[] (session ids left out)
SELECT
    count(*) AS total_sessions,
    count(*) FILTER (WHERE status = 'active') AS active_sessions,
    coalesce(sum(message_count), 0) AS messages
FROM agent_sessions
WHERE ($1::uuid IS NULL OR agent_id = $1) AND session_id <> ALL ($2::text[])
