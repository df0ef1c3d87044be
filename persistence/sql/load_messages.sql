-- A page of a session's messages before a number, newest first.
-- $1 uuid, $2 int (before), $3 int (limit)
SELECT * FROM message_rows WHERE session_id = $1 AND seq < $2 ORDER BY seq DESC LIMIT $3
