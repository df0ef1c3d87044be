-- Deletes an agent; its sessions stay.
-- $1 uuid
DELETE FROM agents WHERE id = $1
