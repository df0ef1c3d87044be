"""Sessions with a history, in the stores of each row, before it is measured."""

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import asyncpg
import msgspec
from bench_servers import Servers
from langchain_core.messages import AIMessage, HumanMessage
from langgraph.checkpoint.postgres.aio import AsyncPostgresSaver
from uuid_utils.compat import uuid7

from gateway.app import Stores, build_worker
from gateway.settings import load_settings
from persistence.agents import Agent, AgentDefinition
from persistence.connection import gather_bounded
from persistence.records import Message, Turn, iso
from persistence.sessions import Access, Begun, NewSession
from persistence.worker import Worker

QUESTION = ("Where is my order, and when will it be here? I have waited for a week. " * 3)[:200]
PAST = ("It has left our house, and the parcel service says that it comes soon. " * 3)[:200]
AGENT_ID = "01900000-0000-7000-8000-00000000be9c"
AGENT: dict[str, Any] = {"rate_limit": {"messages": 100000, "per_s": 60}}


def session_id(number: int) -> str:
    return f"session_bench_{number:09d}"


async def fill_gateway(servers: Servers, sessions: int, messages: int) -> None:
    """Sessions in Redis with all they said in Postgres, as the gateway itself leaves them: one is made by it and flushed, the
    others are copies of it."""
    settings = load_settings(servers.environment)
    stores = Stores(settings)
    worker = await build_worker(settings, stores)
    definition = AgentDefinition(graph="bench", rate_limit=None)
    agent = Agent(AGENT_ID, "bench", definition)
    await stores.postgres.put_agent(agent)
    await stores.agent_copies.put(agent)
    visitor, policy = Access(AGENT_ID, authorized=True), definition.policy
    template = session_id(0)
    await stores.sessions.open(
        NewSession(
            id=str(uuid7()),
            session_id=template,
            agent_id=AGENT_ID,
            channel="text",
            website_domain="",
            user_id="",
            ip_address="127.0.0.1",
            user_agent="",
            metadata={"page": "/cart"},
            minted=False,
            hot_ttl_s=86_400,
        ),
        ticket=(await stores.sessions.read(template, visitor)).ticket,  # type: ignore[union-attr]
    )
    for number in range(1, messages // 2 + 1):
        turn_id = str(uuid7())
        begun = await stores.sessions.begin(template, turn_id, visitor, policy)
        assert isinstance(begun, Begun), begun
        at = iso(begun.now_ms)
        said = [Message(str(uuid7()), "user", QUESTION, at), Message(str(uuid7()), "assistant", PAST, at)]
        turn = Turn(turn_id, None, 2 * number - 1, said)
        assert await stores.sessions.commit(template, turn_id, begun.fence, number, turn, policy)
        if number % 10 == 0 or number == messages // 2:
            await _flush(worker)
    await _flush(worker)
    client: Any = stores.client
    key = stores.keys.session(template)
    fields = await client.hgetall(key)
    live = await client.zscore(stores.keys.live(0), template)
    for begin in range(1, sessions, 500):
        pipe = client.pipeline(transaction=False)
        for number in range(begin, min(begin + 500, sessions)):
            name = session_id(number)
            pipe.hset(stores.keys.session(name), mapping={**fields, b"id": str(uuid7()), b"session_id": name})
            pipe.pexpire(stores.keys.session(name), 86_400_000)
            pipe.zadd(stores.keys.live(0), {name: live})
        await pipe.execute()
    await stores.close()


async def _flush(worker: Worker) -> None:
    """Brings to Postgres what is on the outbox, as the worker process does."""
    while await worker.flush_once():
        pass


async def fill_peer(servers: Servers, row: str, sessions: int, messages: int) -> None:
    """The tables of a row that is not the gateway's, filled."""
    now = datetime.now(UTC)
    history = [("user", QUESTION), ("assistant", PAST)] * (messages // 2)
    connection = await asyncpg.connect(servers.postgres.url)
    match row:
        case "first":
            await connection.execute(
                "CREATE TABLE first_sessions (session_id varchar(255) PRIMARY KEY, conversation_history jsonb, last_activity_at timestamptz)"
            )
            said = [
                {"id": str(uuid7()), "role": role, "content": content, "created_at": now.isoformat()} for role, content in history
            ]
            text = msgspec.json.encode(said).decode()
            await connection.copy_records_to_table(
                "first_sessions", records=[(session_id(number), text, now) for number in range(sessions)]
            )
        case "rows":
            await connection.execute(
                "CREATE TABLE rows_sessions (session_id varchar(255) PRIMARY KEY, message_count int, last_activity_at timestamptz);"
                "CREATE TABLE rows_messages (id uuid PRIMARY KEY, seq bigserial, session_id varchar(255) REFERENCES rows_sessions,"
                " role varchar(20), content text, created_at timestamptz)"
            )
            await connection.copy_records_to_table(
                "rows_sessions", records=[(session_id(number), messages, now) for number in range(sessions)]
            )
            await connection.copy_records_to_table(
                "rows_messages",
                columns=["id", "session_id", "role", "content", "created_at"],
                records=[
                    (UUID(str(uuid7())), session_id(number), role, content, now) for number in range(sessions) for role, content in history
                ],
            )
            await connection.execute("CREATE INDEX ON rows_messages (session_id, seq)")
        case _:
            from bench_graph import builder

            async with AsyncPostgresSaver.from_conn_string(servers.postgres.url) as saver:
                await saver.setup()
                graph = builder.compile(checkpointer=saver)
                past = [HumanMessage(text) if role == "user" else AIMessage(text) for role, text in history]
                for number in range(sessions):
                    config: Any = {"configurable": {"thread_id": session_id(number)}}
                    await graph.aupdate_state(config, {"messages": [one.model_copy(update={"id": str(uuid7())}) for one in past]}, as_node="answer")
    await connection.execute("VACUUM ANALYZE")
    await connection.close()


async def fill_langgraph_dev(port: int, sessions: int, messages: int) -> list[str]:
    """Threads of `langgraph dev` with a history; their ids."""
    import httpx

    past = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": PAST}] * (messages // 2)
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=60) as client:

        async def one() -> str:
            thread = (await client.post("/threads", json={"metadata": {"graph_id": "bench"}})).json()["thread_id"]
            if past:
                body = {"values": {"messages": past}, "as_node": "answer"}
                (await client.post(f"/threads/{thread}/state", json=body)).raise_for_status()
            return str(thread)

        return await gather_bounded((one() for _ in range(sessions)), 8)
