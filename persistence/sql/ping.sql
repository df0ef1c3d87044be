-- The number of the newest migration applied, 0 without any.
-- (no parameters)
SELECT coalesce(max(number), 0) FROM schema_migrations
