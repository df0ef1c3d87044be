"""How fast a worker brings turns from the outbox to Postgres, beside bare inserts of them: `scripts/bench flush`."""

import argparse
import asyncio
from collections.abc import Sequence
from datetime import datetime
from statistics import median
from time import perf_counter
from typing import Any

import asyncpg
from bench_drain import TURNS_A_SESSION, queue_turns, waiting
from bench_servers import Servers, gateway, own_servers

from gateway.app import Stores
from gateway.settings import load_settings
from persistence.records import Record, decode_record

BATCH = 1000
"""Turns of one bare insert."""
TABLE = "CREATE TABLE bare_messages (LIKE agent_messages INCLUDING ALL)"
INSERT = """
INSERT INTO bare_messages (id, session_id, role, content, turn_id, turn, seq, created_at)
SELECT * FROM unnest($1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::uuid[], $6::int[], $7::int[], $8::timestamptz[])
"""


async def measure_flush(options: argparse.Namespace) -> None:
    """Prints turns per second of one worker and of bare `unnest` inserts, in turn, and their ratio."""
    worker_rates, bare_rates = [], []
    sessions = max(1, options.turns // TURNS_A_SESSION)
    rounds = options.turns // sessions
    turns = sessions * rounds
    room = {"GATEWAY_MAX_BACKLOG": str(2 * turns + sessions), "GATEWAY_MAX_BACKLOG_BYTES": str(2**50)}
    for number in range(options.rounds):
        with own_servers(**room) as servers:
            stores = Stores(load_settings(servers.environment))
            await stores.check()
            await queue_turns(stores, sessions, rounds)
            bare_rates.append(turns / await _bare(servers, await _records(stores)))
            began = perf_counter()
            with gateway("worker", servers):
                while not await _arrived(servers):  # noqa: ASYNC110  # another process works
                    await asyncio.sleep(0.01)
                first = perf_counter()
                while await waiting(stores):  # noqa: ASYNC110  # another process works
                    await asyncio.sleep(0.01)
                worker_rates.append(turns / (perf_counter() - first))
            await stores.close()
        print(
            f"round {number + 1}: worker {worker_rates[-1]:,.0f} turns/s (first row after {first - began:.1f} s), "
            f"bare inserts {bare_rates[-1]:,.0f} turns/s, {worker_rates[-1] / bare_rates[-1]:.2f} of them",
            flush=True,
        )
    ratio = median(a / b for a, b in zip(worker_rates, bare_rates, strict=True))
    print(f"medians: worker {median(worker_rates):,.0f}, bare inserts {median(bare_rates):,.0f} turns/s, ratio {ratio:.2f}")


async def _records(stores: Stores) -> list[Record]:
    """What is on the outbox, read and left there."""
    records: list[Record] = []
    last = b"-"
    client: Any = stores.client
    while entries := await client.xrange(stores.keys.outbox(0), last, "+", 1000):
        records += [decode_record(entry, [part for pair in fields.items() for part in pair]) for entry, fields in entries]
        last = b"(" + entries[-1][0]
    return records


def _rows(records: Sequence[Record]) -> list[tuple[Any, ...]]:
    return [
        (
            m.id,
            r.session.id,
            m.role,
            m.content,
            r.turn.id,
            r.session.turns,
            r.turn.seq + i,
            datetime.fromisoformat(m.created_at),
        )
        for r in records
        if r.turn
        for i, m in enumerate(r.turn.messages)
    ]


async def _bare(servers: Servers, records: Sequence[Record]) -> float:
    """Seconds that bare inserts of the messages take, in batches, each a transaction of its own."""
    connection = await asyncpg.connect(servers.postgres.url)
    await connection.execute(TABLE)
    turns = [record for record in records if record.turn]
    batches = [
        [list(column) for column in zip(*_rows(turns[i : i + BATCH]), strict=True)] for i in range(0, len(turns), BATCH)
    ]
    began = perf_counter()
    for batch in batches:
        await connection.execute(INSERT, *batch)
    seconds = perf_counter() - began
    await connection.execute("DROP TABLE bare_messages")
    await connection.close()
    return seconds


async def _arrived(servers: Servers) -> bool:
    """Whether the worker has begun."""
    connection = await asyncpg.connect(servers.postgres.url)
    try:
        return bool(await connection.fetchval("SELECT EXISTS (SELECT FROM agent_sessions)"))
    finally:
        await connection.close()
