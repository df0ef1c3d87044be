-- One session by the id its visitor knows.
-- $1 text
SELECT * FROM session_headers WHERE session_id = $1
