-- A turn changes when its session was last active. An index on that gets a new entry with each flush of the session, and so
-- do all others; one on the five minutes in which it was stays as it is most of the time, and then no index changes, if the
-- row finds room on its page.
ALTER TABLE agent_sessions SET (fillfactor = 75);
ALTER TABLE agent_sessions ADD COLUMN active_in timestamptz NOT NULL
    GENERATED ALWAYS AS (date_bin('5 minutes', last_activity_at, '2000-01-01 00:00:00+00')) STORED;

DROP INDEX idx_sessions_activity;
CREATE INDEX idx_sessions_activity ON agent_sessions (active_in DESC);
DROP INDEX idx_sessions_retention;
CREATE INDEX idx_sessions_retention ON agent_sessions (agent_id, active_in);

CREATE OR REPLACE VIEW session_headers AS
SELECT
    id, session_id, agent_id, channel, status, coalesce(external_user_id, user_id::text, '') AS user_id,
    coalesce(website_domain, '') AS website_domain, coalesce(ip_address, '') AS ip_address,
    coalesce(user_agent, '') AS user_agent, started_at, last_activity_at, ended_at, message_count,
    coalesce(context_data, '{}')::text AS context, metadata::text AS metadata, minted, turns, revision, active_in
FROM agent_sessions;
