-- A page of stored sessions, newest activity first.
-- $1 uuid (agent, null any), $2 text (status, null any), $3 text (website domain, null any), $4 text (channel, null any),
-- $5 timestamptz and $6 text (activity and session_id of the session to continue after, null: from the newest), $7 int (limit)
SELECT *
FROM session_headers
WHERE ($1::uuid IS NULL OR agent_id = $1)
    AND ($2::text IS NULL OR status = $2)
    AND ($3::text IS NULL OR website_domain = $3)
    AND ($4::text IS NULL OR channel = $4)
    AND ($5::timestamptz IS NULL OR active_in <= $5 AND (last_activity_at, session_id COLLATE "C") < ($5, $6))
ORDER BY active_in DESC, last_activity_at DESC, session_id COLLATE "C" DESC
LIMIT $7
