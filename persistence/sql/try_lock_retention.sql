-- Lets one worker at a time look for sessions past their retention.
-- (no parameters)
SELECT pg_try_advisory_xact_lock(7305102103)
