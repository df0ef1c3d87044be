-- Brings sessions and messages into the tables: a session to the revision that is newest, one row each, and messages that are
-- not there yet; `message_count` grows by what was really inserted. Gives back the sessions that are over and were changed:
-- their history is to be written. Rows are locked in one order for all workers, messages first, then sessions, each session
-- also when it is not changed.
-- $1 id uuid[], $2 session_id text[], $3 agent_id uuid[], $4 user_id uuid[], $5 external_user_id text[],
-- $6 website_domain text[], $7 ip_address text[], $8 user_agent text[], $9 channel text[], $10 status text[],
-- $11 started_at timestamptz[], $12 last_activity_at timestamptz[], $13 ended_at timestamptz[], $14 context text[],
-- $15 metadata text[], $16 minted bool[], $17 turns int[], $18 revision bigint[]; of messages:
-- $19 id uuid[], $20 session_id uuid[], $21 role text[], $22 content text[], $23 audio_url text[], $24 audio_duration_ms int[],
-- $25 tokens_used int[], $26 latency_ms int[], $27 model_used text[], $28 metadata text[], $29 turn_id uuid[],
-- $30 turn int[], $31 seq int[], $32 message_id text[], $33 turn_metadata text[], $34 created_at timestamptz[]
WITH erased AS MATERIALIZED (
    SELECT id FROM erased_sessions WHERE id = ANY ($1::uuid[])
), inserted AS (
    INSERT INTO agent_messages (
        id, session_id, role, content, audio_url, audio_duration_ms, tokens_used, latency_ms, model_used, metadata,
        turn_id, turn, seq, message_id, turn_metadata, created_at
    )
    SELECT
        id, session_id, role, content, audio_url, audio_duration_ms, tokens_used, latency_ms, model_used,
        metadata::jsonb, turn_id, turn, seq, message_id, turn_metadata::jsonb, created_at
    FROM unnest(
        $19::uuid[], $20::uuid[], $21::text[], $22::text[], $23::text[], $24::int[], $25::int[], $26::int[], $27::text[],
        $28::text[], $29::uuid[], $30::int[], $31::int[], $32::text[], $33::text[], $34::timestamptz[]
    ) AS message (
        id, session_id, role, content, audio_url, audio_duration_ms, tokens_used, latency_ms, model_used, metadata,
        turn_id, turn, seq, message_id, turn_metadata, created_at
    )
    WHERE session_id NOT IN (SELECT id FROM erased)
    ORDER BY session_id, seq
    ON CONFLICT (id) DO NOTHING
    RETURNING session_id
), counted AS (
    SELECT session_id, count(*)::int AS messages FROM inserted GROUP BY session_id
), kept AS (
    INSERT INTO agent_sessions AS stored (
        id, session_id, agent_id, user_id, external_user_id, website_domain, ip_address, user_agent, channel, status,
        started_at, last_activity_at, ended_at, context_data, metadata, minted, turns, revision, message_count
    )
    SELECT
        record.id, record.session_id, agent_id, user_id, external_user_id, website_domain, ip_address, user_agent, channel,
        status, started_at, last_activity_at, ended_at, context::jsonb, metadata::jsonb, minted, turns, revision,
        coalesce(messages, 0)
    FROM unnest(
        $1::uuid[], $2::text[], $3::uuid[], $4::uuid[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[],
        $10::text[], $11::timestamptz[], $12::timestamptz[], $13::timestamptz[], $14::text[], $15::text[], $16::bool[],
        $17::int[], $18::bigint[]
    ) AS record (
        id, session_id, agent_id, user_id, external_user_id, website_domain, ip_address, user_agent, channel, status,
        started_at, last_activity_at, ended_at, context, metadata, minted, turns, revision
    )
    LEFT JOIN counted ON counted.session_id = record.id
    WHERE record.id NOT IN (SELECT id FROM erased)
    ORDER BY record.id
    ON CONFLICT (id) DO UPDATE SET
        user_id = CASE WHEN excluded.revision > stored.revision THEN excluded.user_id ELSE stored.user_id END,
        external_user_id = CASE WHEN excluded.revision > stored.revision THEN excluded.external_user_id ELSE stored.external_user_id END,
        status = CASE WHEN excluded.revision > stored.revision THEN excluded.status ELSE stored.status END,
        last_activity_at = CASE WHEN excluded.revision > stored.revision THEN excluded.last_activity_at ELSE stored.last_activity_at END,
        ended_at = CASE WHEN excluded.revision > stored.revision THEN excluded.ended_at ELSE stored.ended_at END,
        context_data = CASE WHEN excluded.revision > stored.revision THEN excluded.context_data ELSE stored.context_data END,
        turns = CASE WHEN excluded.revision > stored.revision THEN excluded.turns ELSE stored.turns END,
        revision = CASE WHEN excluded.revision > stored.revision THEN excluded.revision ELSE stored.revision END,
        conversation_history = CASE
            WHEN excluded.revision > stored.revision AND excluded.status = 'active' THEN NULL
            ELSE stored.conversation_history
        END,
        message_count = stored.message_count + excluded.message_count
    WHERE excluded.revision > stored.revision OR excluded.message_count > 0
    RETURNING stored.id, stored.status
)
SELECT id FROM kept WHERE status <> 'active'
