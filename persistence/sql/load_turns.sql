-- The messages of a session's turns from a number on, oldest first.
-- $1 uuid, $2 int (first turn)
SELECT * FROM message_rows WHERE session_id = $1 AND turn >= $2 ORDER BY seq
