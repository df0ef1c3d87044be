-- Those of some sessions that have been erased.
-- $1 uuid[]
SELECT id FROM erased_sessions WHERE id = ANY ($1::uuid[])
