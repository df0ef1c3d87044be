-- Lets one worker at a time look for idle sessions.
-- (no parameters)
SELECT pg_try_advisory_xact_lock(7305102102)
