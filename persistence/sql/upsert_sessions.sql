-- Inserts sessions, or brings them to a newer revision; one row a session. Every row is locked, in one order for all
-- workers, also when it is not changed.
-- $1 id uuid[], $2 session_id text[], $3 agent_id uuid[], $4 user_id uuid[], $5 external_user_id text[],
-- $6 website_domain text[], $7 ip_address text[], $8 user_agent text[], $9 channel text[], $10 status text[],
-- $11 started_at timestamptz[], $12 last_activity_at timestamptz[], $13 ended_at timestamptz[], $14 context text[],
-- $15 metadata text[], $16 minted bool[], $17 turns int[], $18 revision bigint[]
INSERT INTO agent_sessions AS stored (
    id, session_id, agent_id, user_id, external_user_id, website_domain, ip_address, user_agent, channel, status,
    started_at, last_activity_at, ended_at, context_data, metadata, minted, turns, revision
)
SELECT
    id, session_id, agent_id, user_id, external_user_id, website_domain, ip_address, user_agent, channel, status,
    started_at, last_activity_at, ended_at, context::jsonb, metadata::jsonb, minted, turns, revision
FROM unnest(
    $1::uuid[], $2::text[], $3::uuid[], $4::uuid[], $5::text[], $6::text[], $7::text[], $8::text[], $9::text[],
    $10::text[], $11::timestamptz[], $12::timestamptz[], $13::timestamptz[], $14::text[], $15::text[], $16::bool[],
    $17::int[], $18::bigint[]
) AS record (
    id, session_id, agent_id, user_id, external_user_id, website_domain, ip_address, user_agent, channel, status,
    started_at, last_activity_at, ended_at, context, metadata, minted, turns, revision
)
WHERE NOT EXISTS (SELECT FROM erased_sessions WHERE erased_sessions.id = record.id)
ORDER BY id
ON CONFLICT (id) DO UPDATE SET
    user_id = excluded.user_id,
    external_user_id = excluded.external_user_id,
    status = excluded.status,
    last_activity_at = excluded.last_activity_at,
    ended_at = excluded.ended_at,
    context_data = excluded.context_data,
    turns = excluded.turns,
    revision = excluded.revision,
    conversation_history = CASE WHEN excluded.status = 'active' THEN NULL ELSE stored.conversation_history END
WHERE excluded.revision > stored.revision
