-- The migrations applied to this database.
-- (no parameters)
SELECT number, name, checksum FROM schema_migrations ORDER BY number
