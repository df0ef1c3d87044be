-- Whether Postgres answers and has been migrated to a number.
-- (no parameters)
SELECT coalesce(max(number), 0) FROM schema_migrations
