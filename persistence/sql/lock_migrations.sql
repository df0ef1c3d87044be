-- Lets one process at a time migrate.
-- (no parameters)
SELECT pg_advisory_xact_lock(7305102103)
