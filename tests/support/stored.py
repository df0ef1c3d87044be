"""Turns and flushes step by step: the Redis layer and the outbox used directly, so that a test can stop between any two."""

from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
from uuid_utils.compat import uuid7

from gateway.app import Stores, build_worker
from gateway.settings import Settings
from persistence.errors import DataRefused
from persistence.history import History
from persistence.housekeeping import Housekeeping
from persistence.hydrator import Hydrated
from persistence.model.agents import TurnPolicy
from persistence.model.codec import decode_record
from persistence.model.session import Access, Message, NewSession, Record, Turn
from persistence.model.times import iso
from persistence.redis.outcomes import Absent, Begun, Hot, Opened
from persistence.worker import Worker

AGENT_ID = "01890000-0000-7000-8000-000000000001"
VISITOR = Access(AGENT_ID)
POLICY = TurnPolicy(hot_turns=25, hot_ttl_s=1800)
Rows = Callable[..., Awaitable[list[Any]]]


def new_session(session_id: str, **fields: Any) -> NewSession:
    """A session that a browser's first message would create."""
    known = {
        "id": str(uuid7()),
        "session_id": session_id,
        "agent_id": AGENT_ID,
        "channel": "text",
        "website_domain": "shop.example",
        "user_id": "",
        "ip_address": "192.0.2.1",
        "user_agent": "Mozilla/5.0",
        "metadata": {"page": "/cart"},
        "minted": False,
        "hot_ttl_s": POLICY.hot_ttl_s,
    }
    return NewSession(**{**known, **fields})


async def begin(stores: Stores, session_id: str, *, policy: TurnPolicy = POLICY, **fields: Any) -> tuple[str, Begun]:
    """Takes a session for a turn, hydrating or creating it (with `fields`) as need be; the turn's id and what begun gave."""
    turn_id = str(uuid7())
    visitor = Access(AGENT_ID, user_id=fields.get("user_id", ""))
    for _ in range(5):
        outcome = await stores.sessions.begin(session_id, turn_id, visitor, policy)
        if isinstance(outcome, Begun):
            return turn_id, outcome
        assert isinstance(outcome, Absent), outcome
        if await stores.hydrator.hydrate(session_id, outcome) is Hydrated.NOWHERE:
            await stores.sessions.open(new_session(session_id, **fields), ticket=outcome.ticket)
    raise AssertionError(f"{session_id} could not be begun")


async def say(
    stores: Stores,
    session_id: str,
    text: str = "Hello",
    *,
    answer: str = "",
    message_id: str = "",
    metadata: dict[str, Any] | None = None,
    context: dict[str, Any] | None = None,
    policy: TurnPolicy = POLICY,
    **fields: Any,
) -> Turn:
    """One committed turn, not flushed."""
    turn_id, begun = await begin(stores, session_id, policy=policy, **fields)
    turn = Turn(
        id=turn_id,
        message_id=message_id or None,
        seq=begun.session.message_count + 1,
        messages=[
            Message(id=str(uuid7()), role="user", content=text, created_at=iso(begun.now_ms), metadata={"page": "/cart"}),
            Message(
                id=str(uuid7()),
                role="assistant",
                content=answer or f"You said: {text}",
                created_at=iso(begun.now_ms + 1),
                tokens_used=7,
                latency_ms=1,
                model_used="echo",
            ),
        ],
        metadata=metadata or {},
    )
    assert await stores.sessions.commit(begun, turn, policy, context)
    return turn


async def open_session(stores: Stores, session_id: str, **fields: Any) -> str:
    """Opens a session without a turn; its UUID."""
    new = new_session(session_id, **fields)
    opened = await stores.sessions.open(new)
    if isinstance(opened, Absent):
        opened = await stores.sessions.open(new, ticket=opened.ticket)
    assert isinstance(opened, Opened), opened
    return new.id


async def take(stores: Stores, count: int = 500, *, claim: bool = False) -> list[Record]:
    """What a worker does first: takes records off the outbox of partition 0."""
    taken = await stores.outbox.take(0, count, claim=claim)
    return [decode_record(entry, fields) for entry, fields in taken.entries]


async def store_records(stores: Stores, records: Sequence[Record]) -> None:
    """What a worker does second: one transaction; once more, for another may insert the same new session at that moment."""
    try:
        async with stores.postgres.transaction(30) as transaction:
            await transaction.flush(records)
    except DataRefused:
        async with stores.postgres.transaction(30) as transaction:
            await transaction.flush(records)


async def mark(stores: Stores, records: Sequence[Record]) -> int:
    """What a worker does third: lets go of the records."""
    return await stores.outbox.mark_flushed(0, records, 1)


async def flush_records(stores: Stores, records: Sequence[Record]) -> None:
    """The second and third step."""
    await store_records(stores, records)
    await mark(stores, records)


async def entries_of(stores: Stores, key: str) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """What is on a stream, oldest first."""
    found: Any = await stores.client.xrange(key)
    return list(found)


async def members_of(stores: Stores, key: str) -> list[bytes]:
    """Who is in a sorted set."""
    found: Any = await stores.client.zrange(key, 0, -1)
    return list(found)


async def fields_of(stores: Stores, session_id: str) -> dict[str, str]:
    """The session's hash as an operator sees it; empty when there is none."""
    raw: dict[Any, Any] = await stores.client.hgetall(stores.keys.session(session_id))
    return {name.decode(): value.decode() for name, value in raw.items()}


async def ttl_of(stores: Stores, session_id: str) -> int:
    """Seconds; -1 without, -2 when the session is not in Redis."""
    return int(await stores.client.ttl(stores.keys.session(session_id)))


async def evict(stores: Stores, session_id: str) -> None:
    """What Redis does when memory is short; it may only take what has a TTL."""
    assert await ttl_of(stores, session_id) > 0, "Redis would not evict this session"
    await stores.client.delete(stores.keys.session(session_id))


async def read(stores: Stores, session_id: str) -> Hot:
    """The session as the API reads it: from Postgres when Redis has it no more."""
    found = await stores.hydrator.with_session(
        session_id, lambda: stores.sessions.read(session_id, Access(authorized=True, trusted=True), 1000)
    )
    assert isinstance(found, Hot), found
    return found


async def contents(rows: Rows, session_id: str) -> list[str]:
    """What Postgres has of a session's messages, in order."""
    found = await rows(
        "SELECT content FROM agent_messages m JOIN agent_sessions s ON s.id = m.session_id "
        "WHERE s.session_id = $1 ORDER BY seq",
        session_id,
    )
    return [row["content"] for row in found]


async def check_tables(rows: Rows) -> None:
    """What always holds in Postgres: message_count is the number of messages, which are numbered from 1 without gaps."""
    wrong = await rows(
        "SELECT s.session_id, s.message_count, array_agg(m.seq ORDER BY m.seq) AS seqs FROM agent_sessions s "
        "JOIN agent_messages m ON m.session_id = s.id GROUP BY s.id "
        "HAVING s.message_count <> count(*) OR max(m.seq) <> count(*) OR min(m.seq) <> 1"
    )
    assert not wrong, wrong


@asynccontextmanager
async def another(settings: Settings, name: str = "another", **changes: Any) -> AsyncIterator[Stores]:
    """Stores of another process: its own connections, its own consumer name."""
    stores = Stores(msgspec.structs.replace(settings, worker_name=name, **changes))
    try:
        yield stores
    finally:
        await stores.close()


@asynccontextmanager
async def another_worker(settings: Settings, name: str = "another", **changes: Any) -> AsyncIterator[Worker]:
    """A worker of another process."""
    changed = msgspec.structs.replace(settings, worker_name=name, **changes)
    async with another(changed, name) as stores:
        yield await build_worker(changed, stores)


def housekeeping_of(stores: Stores, session_timeout_s: float) -> Housekeeping:
    """The worker's jobs beside the flush, to be run by hand."""
    return Housekeeping(
        stores.scripts,
        stores.keys,
        stores.sessions,
        stores.postgres,
        stores.agent_copies,
        stores.partitions,
        session_timeout_s=session_timeout_s,
    )


def history_of(stores: Stores) -> History:
    """What the API reads through."""
    return History(
        stores.scripts,
        stores.keys,
        stores.sessions,
        stores.turn_logs,
        stores.postgres,
        stores.hydrator,
        stores.outbox,
        stores.partitions,
    )
