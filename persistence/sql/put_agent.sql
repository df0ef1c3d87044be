-- Creates an agent or replaces its definition; returns its row.
-- $1 uuid, $2 text (name), $3 text (definition, JSON)
INSERT INTO agents (id, name, definition) VALUES ($1, $2, $3::text::jsonb)
ON CONFLICT (id) DO UPDATE SET name = excluded.name, definition = excluded.definition, updated_at = now()
RETURNING id, name, definition::text AS definition
