-- The sessions of an agent by their last activity: the retention job, which looks for those that are too old.
CREATE INDEX idx_sessions_retention ON agent_sessions (agent_id, last_activity_at, session_id COLLATE "C");
