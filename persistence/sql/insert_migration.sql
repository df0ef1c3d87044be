-- Records that a migration has been applied.
-- $1 int, $2 text, $3 text
INSERT INTO schema_migrations (number, name, checksum) VALUES ($1, $2, $3)
