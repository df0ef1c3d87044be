"""Sessions with a history, in the stores of each row, before it is measured."""

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
import httpx
import msgspec
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from uuid_utils.compat import uuid7

from gateway.access.tokens import SessionToken, SessionTokens
from gateway.app import Stores, build_worker
from gateway.settings import load_settings
from persistence.model.agents import Agent, AgentDefinition, RateLimit
from persistence.model.session import Access, Message, NewSession, Turn
from persistence.model.times import iso
from persistence.redis.outcomes import Begun, Hot
from persistence.tasks import gather_bounded
from scripts.benchmarks.graphs.canned import builder
from scripts.benchmarks.servers import KEY, Servers

QUESTION = ("Where is my order, and when will it be here? I have waited for a week. " * 3)[:200]
PAST = ("It has left our house, and the parcel service says that it comes soon. " * 3)[:200]
AGENT_ID = "01900000-0000-7000-8000-00000000be9c"
DOMAIN = "shop.example"
# Limits that are looked at with every turn and refuse none of these.
AGENT = AgentDefinition(
    graph="bench",
    allowed_domains=(DOMAIN,),
    rate_limit=RateLimit(1_000_000, 60),
    agent_rate_limit=RateLimit(1_000_000, 60),
    require_token=True,
)
DAY_MS = 86_400_000
CLONE = """
local sessions, live, begin, count, score, ttl, dump = unpack(ARGV)
for number = begin, begin + count - 1 do
  local name = string.format('session_bench_%09d', number)
  local key = sessions .. name
  redis.call('RESTORE', key, ttl, dump)
  redis.call('HSET', key, 'session_id', name, 'id', string.format('01900000-0000-7000-8000-%012x', number))
  redis.call('ZADD', live, score, name)
end
"""
"""Copies of a dumped session; their ids are those of CLONE_ROWS."""
CLONE_AT_ONCE = 5000
CLONE_ROWS = """
SET session_replication_role = replica;
INSERT INTO agent_sessions (
    id, session_id, agent_id, website_domain, ip_address, user_agent, channel, message_count, context_data, metadata, status,
    started_at, last_activity_at, minted, turns, revision
)
SELECT
    ('01900000-0000-7000-8000-' || lpad(to_hex(number), 12, '0'))::uuid, 'session_bench_' || lpad(number::text, 9, '0'),
    agent_id, website_domain, ip_address, user_agent, channel, message_count, context_data, metadata, status, started_at,
    last_activity_at, minted, turns, revision
FROM agent_sessions AS template, generate_series(1, {sessions} - 1) AS number;
INSERT INTO agent_messages (id, session_id, role, content, turn_id, turn, seq, created_at)
SELECT
    ('01900000-0001-7000-8000-' || lpad(to_hex(number * 4096 + seq), 12, '0'))::uuid,
    ('01900000-0000-7000-8000-' || lpad(to_hex(number), 12, '0'))::uuid, role, content,
    ('01900000-0002-7000-8000-' || lpad(to_hex(number * 4096 + turn), 12, '0'))::uuid, turn, seq, created_at
FROM generate_series(1, {sessions} - 1) AS number, agent_messages ORDER BY number, seq;
RESET session_replication_role;
"""
SETTLE = "VACUUM ANALYZE", "CHECKPOINT"


def session_id(number: int) -> str:
    return f"session_bench_{number:09d}"


def token(number: int) -> str:
    """The session token that the visitor of a session has."""
    return SessionTokens([KEY], 86_400).mint(SessionToken(session_id(number), AGENT_ID, DOMAIN))


async def fill_gateway(
    servers: Servers,
    sessions: int,
    messages: int,
    *,
    definition: AgentDefinition = AGENT,
    question: str = QUESTION,
    answer: str = PAST,
) -> None:
    """Sessions in Redis and Postgres, as the gateway itself leaves them: it makes the first, the others are copies of that.

    Many sessions that have next to nothing said (`messages` up to 2) are in Redis alone.
    """
    settings = load_settings(servers.environment)
    stores = Stores(settings)
    worker = await build_worker(settings, stores)
    agent = Agent(AGENT_ID, "bench", definition)
    await stores.postgres.put_agent(agent)
    await stores.agent_copies.put(agent)
    visitor, policy = Access(AGENT_ID, DOMAIN, authorized=True), definition.policy
    template = session_id(0)
    await stores.sessions.open(
        NewSession(
            id=str(uuid7()),
            session_id=template,
            agent_id=AGENT_ID,
            channel="text",
            website_domain=DOMAIN,
            user_id="",
            ip_address="127.0.0.1",
            user_agent="Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
            metadata={"page": "/cart"},
            minted=True,
            hot_ttl_s=86_400,
        )
    )
    for number in range(1, messages // 2 + 1):
        turn_id = str(uuid7())
        begun = await stores.sessions.begin(template, turn_id, visitor, policy)
        assert isinstance(begun, Begun), begun
        at = iso(begun.now_ms)
        said = [Message(str(uuid7()), "user", question, at), Message(str(uuid7()), "assistant", answer, at)]
        turn = Turn(turn_id, None, 2 * number - 1, said)
        assert await stores.sessions.commit(begun, turn, policy)
        # Turns leave the hash only once they are in Postgres.
        while await worker.flush_once():
            pass
    while await worker.flush_once():
        pass
    hot = await stores.sessions.read(template, visitor)
    assert isinstance(hot, Hot) and hot.session.message_count == messages // 2 * 2, hot
    await _clone(stores, template, sessions)
    await stores.close()
    connection = await asyncpg.connect(servers.postgres.url)
    if messages > 2 or sessions <= 2000:
        await connection.execute(CLONE_ROWS.format(sessions=sessions))
    for statement in SETTLE:
        await connection.execute(statement)
    await connection.close()


async def _clone(stores: Stores, template: str, sessions: int) -> None:
    client: Any = stores.client
    key, live = stores.keys.session(template), stores.keys.live(0)
    dump, score = await client.dump(key), await client.zscore(live, template)
    clone = client.register_script(CLONE)
    for begin in range(1, sessions, CLONE_AT_ONCE):
        count = min(CLONE_AT_ONCE, sessions - begin)
        await clone([], [key.removesuffix(template), live, begin, count, score, DAY_MS, dump])


async def fill_peer(servers: Servers, row: str, sessions: int, messages: int) -> None:
    """The tables of a row that is not the gateway's, filled."""
    now = datetime.now(UTC)
    history = [("user", QUESTION), ("assistant", PAST)] * (messages // 2)
    connection = await asyncpg.connect(servers.postgres.url)
    match row:
        case "first":
            await connection.execute(
                "CREATE TABLE first_sessions (session_id varchar(255) PRIMARY KEY, conversation_history jsonb,"
                " last_activity_at timestamptz)"
            )
            said = [
                {"id": str(uuid7()), "role": role, "content": content, "created_at": now.isoformat()}
                for role, content in history
            ]
            text = msgspec.json.encode(said).decode()
            await connection.copy_records_to_table(
                "first_sessions", records=[(session_id(number), text, now) for number in range(sessions)]
            )
        case "rows":
            await connection.execute(
                "CREATE TABLE rows_sessions (session_id varchar(255) PRIMARY KEY, message_count int,"
                " last_activity_at timestamptz);"
                "CREATE TABLE rows_messages (id uuid PRIMARY KEY, seq bigserial,"
                " session_id varchar(255) REFERENCES rows_sessions, role varchar(20), content text, created_at timestamptz)"
            )
            await connection.copy_records_to_table(
                "rows_sessions", records=[(session_id(number), messages, now) for number in range(sessions)]
            )
            await connection.copy_records_to_table(
                "rows_messages",
                columns=["id", "session_id", "role", "content", "created_at"],
                records=[
                    (UUID(str(uuid7())), session_id(number), role, content, now)
                    for number in range(sessions)
                    for role, content in history
                ],
            )
            await connection.execute("CREATE INDEX ON rows_messages (session_id, seq)")
        case _:
            async with AsyncPostgresSaver.from_conn_string(servers.postgres.url) as saver:
                await saver.setup()
                if history:
                    await _checkpoint(saver, session_id(0), history)
            for table in ("checkpoints", "checkpoint_blobs", "checkpoint_writes"):
                await connection.execute(
                    f"INSERT INTO {table} SELECT (jsonb_populate_record(template, jsonb_build_object("  # noqa: S608  # a name of ours
                    "'thread_id', 'session_bench_' || lpad(number::text, 9, '0')))).*"
                    f" FROM {table} AS template, generate_series(1, {sessions} - 1) AS number"
                )
    for statement in SETTLE:
        await connection.execute(statement)
    await connection.close()


async def _checkpoint(saver: AsyncPostgresSaver, thread: str, history: list[tuple[str, str]]) -> None:
    """A thread with a history, in the checkpointer's own tables."""
    graph = builder.compile(checkpointer=saver)
    past = [(HumanMessage if role == "user" else AIMessage)(text, id=str(uuid7())) for role, text in history]
    await graph.aupdate_state({"configurable": {"thread_id": thread}}, {"messages": past}, as_node="answer")


async def fill_langgraph_dev(port: int, sessions: int, messages: int) -> list[str]:
    """Threads of `langgraph dev` with a history; their ids."""
    past = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": PAST}] * (messages // 2)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        async def one() -> str:
            thread = (await client.post("/threads", json={"metadata": {"graph_id": "bench"}})).json()["thread_id"]
            if past:
                body = {"values": {"messages": past}, "as_node": "answer"}
                (await client.post(f"/threads/{thread}/state", json=body)).raise_for_status()
            return str(thread)

        return await gather_bounded((one() for _ in range(sessions)), 8)
