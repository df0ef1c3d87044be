-- Lets any number of flushes run at once, but none beside an erasure.
-- (no parameters)
SELECT pg_advisory_xact_lock_shared(7305102101)
