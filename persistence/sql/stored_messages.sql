-- Those of some messages that are stored already.
-- $1 uuid[]
SELECT id FROM agent_messages WHERE id = ANY ($1::uuid[])
