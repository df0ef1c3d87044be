-- The agents with a retention limit, and its days.
-- (no parameters)
SELECT id, name, (definition ->> 'retention_days')::int AS days
FROM agents
WHERE definition ->> 'retention_days' IS NOT NULL
ORDER BY id
