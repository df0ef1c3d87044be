-- Erases sessions and their messages, and remembers the ids so that no late record brings them back.
-- $1 uuid[]
WITH erased AS (DELETE FROM agent_sessions WHERE id = ANY ($1::uuid[]))
INSERT INTO erased_sessions (id) SELECT unnest($1::uuid[]) ON CONFLICT DO NOTHING
