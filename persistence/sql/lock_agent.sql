-- One agent by id or name, its row locked until the transaction ends.
-- $1 uuid (null: by name), $2 text
SELECT id, name, definition::text AS definition
FROM agents
WHERE CASE WHEN $1::uuid IS NOT NULL THEN id = $1 ELSE name = $2 END
FOR UPDATE
