-- Every agent, by name.
-- (no parameters)
SELECT id, name, definition::text AS definition FROM agents ORDER BY name
