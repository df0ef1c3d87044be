"""How fast what waited for Postgres arrives there once it is back: `scripts/bench drain`."""

import argparse
import asyncio
import json
from datetime import datetime
from time import perf_counter
from typing import NamedTuple

import asyncpg
from uuid_utils.compat import uuid7

from gateway.app import Stores
from gateway.settings import load_settings
from persistence.model.agents import TurnPolicy
from persistence.model.session import Access, Message, NewSession, Turn
from persistence.model.times import iso
from persistence.redis.keys import GROUP
from persistence.redis.outcomes import Begun
from persistence.tasks import gather_bounded
from scripts.benchmarks.servers import Servers, gateway, own_servers

AGENT_ID = "01900000-0000-7000-8000-00000000be9c"
VISITOR = Access(AGENT_ID, authorized=True)
POLICY = TurnPolicy(hot_turns=25, hot_ttl_s=1800)
TURNS_A_SESSION = 50
AT_ONCE = 64


class Row(NamedTuple):
    """A message as Postgres has it: all that a turn of text fills."""

    id: str
    session_id: str
    role: str
    content: str
    latency_ms: int | None
    metadata: str | None
    turn_id: str
    turn: int
    seq: int
    turn_metadata: str | None
    created_at: datetime


async def measure_drain(options: argparse.Namespace) -> None:
    """Queues turns while Postgres is down, starts it, and prints how long a running worker takes to bring them there."""
    sessions = max(1, options.turns // TURNS_A_SESSION)
    rounds = options.turns // sessions
    turns = sessions * rounds
    room = {"GATEWAY_MAX_BACKLOG": str(2 * turns + sessions), "GATEWAY_MAX_BACKLOG_BYTES": str(2**50)}
    with own_servers(**room) as servers:
        servers.postgres.stop()
        stores = Stores(load_settings(servers.environment))
        await stores.check()
        with gateway("worker", servers):
            began = perf_counter()
            await queue_turns(stores, sessions, rounds)
            print(f"{turns:,} turns of {sessions:,} sessions queued in {perf_counter() - began:.1f} s, Postgres down")
            await _print_fullest(stores)
            await asyncio.to_thread(servers.postgres.start)
            began = perf_counter()
            while await waiting(stores):  # noqa: ASYNC110  # another process works
                await asyncio.sleep(0.05)
            seconds = perf_counter() - began
        await stores.close()
        print("from Postgres accepting connections until outbox and pending list are empty, one worker:")
        print(f"  {seconds:.1f} s, {turns / seconds:,.0f} turns/s")
        await _check(servers, sessions, rounds)
        print(f"  {2 * turns:,} messages are in Postgres, each once, in order, with its words")


def _session_id(number: int) -> str:
    return f"session_bench_{number:09d}"


def _words(number: int, turn: int) -> tuple[str, str]:
    """What is asked and answered in a turn: some 100 and 400 characters, no two alike."""
    name = f"session {number}, turn {turn}"
    return f"Question of {name}. " + "Where is my order? " * 4, f"Answer of {name}. " + "It is on its way to you. " * 15


async def queue_turns(stores: Stores, sessions: int, rounds: int) -> list[Row]:
    """One turn of every session, then the next one of every session: as visitors who chat at the same time. Gives the rows
    that their messages are in Postgres."""
    ids = await gather_bounded((_open(stores, number) for number in range(sessions)), AT_ONCE)
    rows: list[Row] = []
    for turn in range(1, rounds + 1):
        said = await gather_bounded((_say(stores, number, ids[number], turn) for number in range(sessions)), AT_ONCE)
        rows += [row for pair in said for row in pair]
    return rows


async def _open(stores: Stores, number: int) -> str:
    new = NewSession(
        id=str(uuid7()),
        session_id=_session_id(number),
        agent_id=AGENT_ID,
        channel="text",
        website_domain="shop.example",
        user_id="",
        ip_address="192.0.2.1",
        user_agent="Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0",
        metadata={"page": "/cart"},
        minted=True,
        hot_ttl_s=POLICY.hot_ttl_s,
    )
    await stores.sessions.open(new)
    return new.id


async def _say(stores: Stores, number: int, session: str, turn: int) -> list[Row]:
    session_id, turn_id = _session_id(number), str(uuid7())
    begun = await stores.sessions.begin(session_id, turn_id, VISITOR, POLICY)
    assert isinstance(begun, Begun), begun
    at = iso(begun.now_ms)
    question, answer = _words(number, turn)
    messages = [
        Message(str(uuid7()), "user", question, at, metadata={"page": "/cart"}),
        Message(str(uuid7()), "assistant", answer, at, latency_ms=1234),
    ]
    committed = await stores.sessions.commit(begun, Turn(turn_id, None, 2 * turn - 1, messages), POLICY)
    assert committed, f"turn {turn} of {session_id} was lost"
    moment = datetime.fromisoformat(at)
    return [
        Row(
            id=one.id,
            session_id=session,
            role=one.role,
            content=one.content,
            latency_ms=one.latency_ms,
            metadata=None if one.metadata is None else json.dumps(one.metadata),
            turn_id=turn_id,
            turn=turn,
            seq=2 * turn - 1 + index,
            turn_metadata="{}" if one.role == "assistant" else None,
            created_at=moment,
        )
        for index, one in enumerate(messages)
    ]


async def _print_fullest(stores: Stores) -> None:
    outbox = stores.keys.outbox(0)
    backlog = await stores.outbox.backlog(0)
    memory = await stores.client.execute_command("MEMORY", "USAGE", outbox, "SAMPLES", 0)
    used = (await stores.client.info("memory"))["used_memory"]
    print(
        f"  outbox: {backlog.records:,} records, {backlog.bytes / 2**20:,.0f} MiB counted, "
        f"{memory / 2**20:,.0f} MiB of memory; Redis in all {used / 2**20:,.0f} MiB"
    )


async def waiting(stores: Stores) -> int:
    outbox = stores.keys.outbox(0)
    return int(await stores.client.xlen(outbox)) + int((await stores.client.xpending(outbox, GROUP))["pending"])


async def _check(servers: Servers, sessions: int, rounds: int) -> None:
    """Raises AssertionError unless Postgres has exactly what was said."""
    connection = await asyncpg.connect(servers.postgres.url)
    rows = await connection.fetch(
        "SELECT s.session_id, m.seq, m.content FROM agent_messages m JOIN agent_sessions s ON s.id = m.session_id"
    )
    counts = await connection.fetch("SELECT message_count FROM agent_sessions")
    await connection.close()
    expected = {
        (_session_id(number), 2 * turn - 1 + index): words
        for number in range(sessions)
        for turn in range(1, rounds + 1)
        for index, words in enumerate(_words(number, turn))
    }
    assert len(rows) == len(expected), f"{len(rows)} messages instead of {len(expected)}"
    assert {(row["session_id"], row["seq"]): row["content"] for row in rows} == expected, "other messages than were said"
    assert [row["message_count"] for row in counts] == [2 * rounds] * sessions, "sessions count otherwise"
