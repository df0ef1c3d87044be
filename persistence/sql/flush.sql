-- Writes sessions and messages: of each session the newest revision, and messages that are not stored yet; `message_count`
-- grows by the number of messages really inserted. What is final in either revision stays: an end, a user. Returns of the
-- sessions that were changed those that are not active or have a user, and the erased ones, of which nothing is written.
-- Rows are locked in the same order by all workers (messages, then sessions, unchanged ones too),
-- so that workers do not deadlock.
-- Of messages: $1 id uuid[], $2 session_id uuid[], $3 role text[], $4 content text[], $5 audio_url text[],
-- $6 audio_duration_ms int[], $7 tokens_used int[], $8 latency_ms int[], $9 model_used text[], $10 metadata text[],
-- $11 turn_id uuid[], $12 turn int[], $13 seq int[], $14 message_id text[], $15 turn_metadata text[],
-- $16 created_at timestamptz[]. From $17 on the columns of sessions, one row each: model/fields.py; the first is id uuid[].
WITH erased AS MATERIALIZED (
    SELECT id FROM erased_sessions WHERE id = ANY ($17::uuid[])
), inserted AS (
    INSERT INTO agent_messages (
        id, session_id, role, content, audio_url, audio_duration_ms, tokens_used, latency_ms, model_used, metadata,
        turn_id, turn, seq, message_id, turn_metadata, created_at
    )
    SELECT
        id, session_id, role, content, audio_url, audio_duration_ms, tokens_used, latency_ms, model_used,
        metadata::jsonb, turn_id, turn, seq, message_id, turn_metadata::jsonb, created_at
    FROM unnest(
        $1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::int[], $7::int[], $8::int[], $9::text[],
        $10::text[], $11::uuid[], $12::int[], $13::int[], $14::text[], $15::text[], $16::timestamptz[]
    ) AS message (
        id, session_id, role, content, audio_url, audio_duration_ms, tokens_used, latency_ms, model_used, metadata,
        turn_id, turn, seq, message_id, turn_metadata, created_at
    )
    WHERE session_id NOT IN (SELECT id FROM erased)
    ORDER BY session_id, seq
    ON CONFLICT (id) DO NOTHING
    RETURNING session_id
), counted AS (
    SELECT session_id AS counted_id, count(*)::int AS messages FROM inserted GROUP BY session_id
), kept AS (
    INSERT INTO agent_sessions AS stored ({columns}, message_count)
    SELECT {values}, coalesce(messages, 0)
    FROM unnest({arrays from $17}) AS record ({columns})
    LEFT JOIN counted ON counted_id = record.id
    WHERE record.id NOT IN (SELECT id FROM erased)
    ORDER BY record.id
    ON CONFLICT (id) DO UPDATE SET
        {changes},
        conversation_history = CASE
            WHEN excluded.revision > stored.revision AND excluded.status = 'active' THEN NULL
            ELSE stored.conversation_history
        END,
        message_count = stored.message_count + excluded.message_count
    WHERE excluded.revision > stored.revision OR excluded.message_count > 0 OR {finals}
    RETURNING stored.id, stored.status, coalesce(stored.external_user_id, stored.user_id::text, '') AS user_id
)
SELECT id, status, user_id FROM kept WHERE status <> 'active' OR user_id <> ''
UNION ALL
SELECT id, 'erased', '' FROM erased
