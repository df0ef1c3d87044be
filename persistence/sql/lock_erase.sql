-- Waits for running flushes to end and keeps new ones out until the erasure is committed.
-- (no parameters)
SELECT pg_advisory_xact_lock(7305102101)
