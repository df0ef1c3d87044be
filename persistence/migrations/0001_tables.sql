-- The product's tables, as specified, with what write-behind needs beside them.

CREATE TABLE agents (
    id uuid PRIMARY KEY,
    name varchar(100) NOT NULL UNIQUE,
    definition jsonb NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

CREATE TABLE agent_sessions (
    id uuid PRIMARY KEY,
    session_id varchar(255) NOT NULL CONSTRAINT idx_sessions_session_id UNIQUE,
    agent_id uuid NOT NULL,
    user_id uuid,
    external_user_id text,
    website_domain varchar(255),
    ip_address varchar(45),
    user_agent text,
    channel varchar(50) NOT NULL DEFAULT 'text' CHECK (channel IN ('text', 'voice', 'phone')),
    message_count int NOT NULL DEFAULT 0 CHECK (message_count >= 0),
    conversation_history jsonb,
    context_data jsonb,
    metadata jsonb NOT NULL DEFAULT '{}',
    status varchar(50) NOT NULL DEFAULT 'active' CHECK (status IN ('active', 'ended', 'timeout')),
    started_at timestamptz NOT NULL DEFAULT now(),
    last_activity_at timestamptz NOT NULL DEFAULT now(),
    ended_at timestamptz,
    -- Whether the gateway minted the session id, so that its token is needed.
    minted boolean NOT NULL DEFAULT false,
    -- The number of the last turn, and of the last record about the session: the newest record wins.
    turns int NOT NULL DEFAULT 0,
    revision bigint NOT NULL DEFAULT 0
);

CREATE INDEX idx_sessions_agent_id ON agent_sessions (agent_id);
CREATE INDEX idx_sessions_status ON agent_sessions (status);
-- The list of sessions, newest activity first, and the timeouts job.
CREATE INDEX idx_sessions_activity ON agent_sessions (last_activity_at DESC, session_id COLLATE "C" DESC);

CREATE TABLE agent_messages (
    id uuid PRIMARY KEY,
    session_id uuid NOT NULL REFERENCES agent_sessions (id) ON DELETE CASCADE,
    role varchar(20) NOT NULL CHECK (role IN ('user', 'assistant', 'system')),
    content text NOT NULL,
    audio_url text,
    audio_duration_ms int,
    tokens_used int,
    latency_ms int,
    model_used varchar(100),
    metadata jsonb,
    -- The turn that the message belongs to, the turn's number in the session, and the message's: from 1, without gaps.
    turn_id uuid NOT NULL,
    turn int NOT NULL CHECK (turn > 0),
    seq int NOT NULL CHECK (seq > 0),
    -- The id that the client gave its message, and what it was answered with, so that a retry gets the same.
    message_id varchar(255),
    turn_metadata jsonb,
    created_at timestamptz NOT NULL DEFAULT now()
);

-- Unique, so that no fault can put two messages in one place.
CREATE UNIQUE INDEX idx_messages_session ON agent_messages (session_id, seq);
CREATE INDEX idx_messages_created ON agent_messages (created_at);

-- Sessions that must never reappear, whatever a worker still holds of them. No words of the visitor are in it.
CREATE TABLE erased_sessions (
    id uuid PRIMARY KEY,
    erased_at timestamptz NOT NULL DEFAULT now()
);

-- Sessions and messages in the words of the stored records: empty text for what is not known.
CREATE VIEW session_headers AS
SELECT
    id, session_id, agent_id, channel, status, coalesce(external_user_id, user_id::text, '') AS user_id,
    coalesce(website_domain, '') AS website_domain, coalesce(ip_address, '') AS ip_address,
    coalesce(user_agent, '') AS user_agent, started_at, last_activity_at, ended_at, message_count,
    coalesce(context_data, '{}')::text AS context, metadata::text AS metadata, minted, turns, revision
FROM agent_sessions;

CREATE VIEW message_rows AS
SELECT
    id, session_id, role, content, audio_url, audio_duration_ms, tokens_used, latency_ms, model_used,
    metadata::text AS metadata, turn_id, turn, seq, message_id, turn_metadata::text AS turn_metadata, created_at
FROM agent_messages;
