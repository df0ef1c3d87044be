-- Lets one worker at a time look for sessions that are kept no longer.
-- (no parameters)
SELECT pg_try_advisory_xact_lock(7305102103)
