-- Inserts messages that are not there yet and counts in the sessions what was really inserted.
-- $1 id uuid[], $2 session_id uuid[], $3 role text[], $4 content text[], $5 audio_url text[], $6 audio_duration_ms int[],
-- $7 tokens_used int[], $8 latency_ms int[], $9 model_used text[], $10 metadata text[], $11 turn_id uuid[],
-- $12 turn int[], $13 seq int[], $14 message_id text[], $15 turn_metadata text[], $16 created_at timestamptz[]
WITH inserted AS (
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
    ) AS record (
        id, session_id, role, content, audio_url, audio_duration_ms, tokens_used, latency_ms, model_used, metadata,
        turn_id, turn, seq, message_id, turn_metadata, created_at
    )
    WHERE NOT EXISTS (SELECT FROM erased_sessions WHERE erased_sessions.id = record.session_id)
    ORDER BY session_id, seq
    ON CONFLICT (id) DO NOTHING
    RETURNING session_id
)
UPDATE agent_sessions
SET message_count = message_count + counted.messages
FROM (SELECT session_id, count(*) AS messages FROM inserted GROUP BY session_id) AS counted
WHERE agent_sessions.id = counted.session_id
