"""How fast a worker brings turns from the outbox to Postgres, beside bare inserts of them: `scripts/bench flush`.

And how far it is behind the pods while one answers as fast as it can.
"""

import argparse
import asyncio
from collections.abc import Sequence
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import asyncpg
import msgspec
import psutil
from redis.asyncio import Redis

from gateway.app import Stores
from gateway.settings import load_settings
from persistence.worker import BATCH
from scripts.benchmarks.drain import AGENT_ID, TURNS_A_SESSION, Row, queue_turns, waiting
from scripts.benchmarks.measure import PRODUCTION, load, plan_for, serve, spent, take_cores
from scripts.benchmarks.results import Target, machine, print_targets, save
from scripts.benchmarks.seed import fill_gateway
from scripts.benchmarks.servers import Servers, gateway, own_servers

# The same columns, indexes and references as the real ones.
TABLES = """
CREATE TABLE bare_sessions (LIKE agent_sessions INCLUDING ALL);
CREATE TABLE bare_messages (LIKE agent_messages INCLUDING ALL);
ALTER TABLE bare_messages ADD FOREIGN KEY (session_id) REFERENCES bare_sessions (id) ON DELETE CASCADE;
"""
INSERT_SESSIONS = (
    "INSERT INTO bare_sessions (id, session_id, agent_id) SELECT id, id::text, $2::uuid FROM unnest($1::uuid[]) AS id"
)
INSERT = """
INSERT INTO bare_messages (
    id, session_id, role, content, latency_ms, metadata, turn_id, turn, seq, turn_metadata, created_at
)
SELECT id, session_id, role, content, latency_ms, metadata::jsonb, turn_id, turn, seq, turn_metadata::jsonb, created_at
FROM unnest(
    $1::uuid[], $2::uuid[], $3::text[], $4::text[], $5::int[], $6::text[], $7::uuid[], $8::int[], $9::int[], $10::text[],
    $11::timestamptz[]
) AS message (id, session_id, role, content, latency_ms, metadata, turn_id, turn, seq, turn_metadata, created_at)
"""
DROP = "DROP TABLE bare_messages, bare_sessions"
STORED = "SELECT count(*) / 2 FROM agent_messages"
SIZE = "SELECT pg_total_relation_size('agent_messages') + pg_total_relation_size('agent_sessions')"
SAMPLE_S = 0.02


class Flushed(msgspec.Struct):
    """One round. CPU is milliseconds of each process's time per turn, bytes are what a turn takes on Postgres' disk."""

    worker_per_s: float
    bare_per_s: float
    worker_ms: float
    redis_ms: float
    postgres_ms: float
    bytes_each: float
    begins_after_s: float


class Lag(NamedTuple):
    """How old the oldest record on the outbox is, over samples of a pod that answers all it can."""

    turns_per_s: float
    p50_ms: float
    p99_ms: float
    most_ms: float


async def measure_flush(options: argparse.Namespace) -> None:
    """Prints turns per second of one worker and of bare `unnest` inserts, in turn, their ratio, and the worker's lag."""
    found = machine()
    print(found)
    print(f"{options.turns:,} turns a round, of some 100 and 400 characters")
    results: list[Flushed] = []
    print(f"\n{'':>8}{'worker':>10}{'bare':>10}{'':>7}{'CPU ms per turn':^32}{'bytes in':>10}{'begins':>9}")
    print(
        f"{'':>8}{'turns/s':>10}{'turns/s':>10}{'ratio':>7}{'worker':>10}{'Redis':>10}{'Postgres':>12}{'Postgres':>10}{'after':>9}"
    )
    for number in range(options.rounds):
        results.append(await _round(options.turns, bare_first=number % 2 == 1))
        print(_line(f"round {number + 1}", results[-1]), flush=True)
    whole = Flushed(*(median(getattr(one, field) for one in results) for field in Flushed.__struct_fields__))
    ratio = median(one.worker_per_s / one.bare_per_s for one in results)
    print(_line("median", whole))
    lag = await _lag(take_cores(), options.lag_seconds)
    print(
        f"\nlag while a pod answers {lag.turns_per_s:,.0f} turns/s: p50 {lag.p50_ms:,.0f} ms, p99 {lag.p99_ms:,.0f} ms,"
        f" most {lag.most_ms:,.0f} ms"
    )
    goals = [
        Target.at_least("turns/s of a worker, times bare inserts (median of the rounds' ratios)", ratio, 0.5),
        Target.at_most("lag under full load, p99, ms", lag.p99_ms, 1000),
    ]
    print_targets(goals)
    save("flush", {"machine": found, "median": whole, "ratio": ratio, "lag": lag, "targets": goals, "rounds": results})
    print("\nin .bench: flush.json")


def _line(name: str, one: Flushed) -> str:
    return (
        f"{name:>8}{one.worker_per_s:>10,.0f}{one.bare_per_s:>10,.0f}{one.worker_per_s / one.bare_per_s:>7.2f}"
        f"{one.worker_ms:>10.3f}{one.redis_ms:>10.3f}{one.postgres_ms:>12.3f}{one.bytes_each:>10,.0f}"
        f"{one.begins_after_s:>7.1f} s"
    )


async def _round(wanted: int, *, bare_first: bool) -> Flushed:
    sessions = max(1, wanted // TURNS_A_SESSION)
    rounds = wanted // sessions
    turns = sessions * rounds
    room = {"GATEWAY_MAX_BACKLOG": str(2 * turns + sessions), "GATEWAY_MAX_BACKLOG_BYTES": str(2**50)}
    with own_servers(**room) as servers:
        stores = Stores(load_settings(servers.environment))
        await stores.check()
        rows = await queue_turns(stores, sessions, rounds)
        if bare_first:
            bare_s = await _bare(servers, rows)
        flushed = await _worker(servers, stores, turns)
        if not bare_first:
            bare_s = await _bare(servers, rows)
        await stores.close()
    flushed.bare_per_s = turns / bare_s
    return flushed


async def _worker(servers: Servers, stores: Stores, turns: int) -> Flushed:
    """A worker process empties the outbox. What counts begins with its first rows: its start is no flushing."""
    connection = await asyncpg.connect(servers.postgres.url)
    redis, postgres = psutil.Process(servers.redis.pid), psutil.Process(servers.postgres.pid)
    launched = perf_counter()
    with gateway("worker", servers) as process_id:
        worker = psutil.Process(process_id)
        while not (there := await connection.fetchval(STORED)):  # noqa: ASYNC110  # another process works
            await asyncio.sleep(0.005)
        began = perf_counter()
        before = [spent(one) for one in (worker, redis, postgres)]
        while await waiting(stores):  # noqa: ASYNC110  # another process works
            await asyncio.sleep(0.01)
        ended = perf_counter()
        after = [spent(one) for one in (worker, redis, postgres)]
    arrived = await connection.fetchval(STORED)
    if arrived != turns:
        raise RuntimeError(f"{arrived} turns are in Postgres, and not {turns}")
    size = await connection.fetchval(SIZE)
    await connection.close()
    left = turns - there
    worker_ms, redis_ms, postgres_ms = ((b - a) * 1000 / left for a, b in zip(before, after, strict=True))
    return Flushed(left / (ended - began), 0, worker_ms, redis_ms, postgres_ms, size / turns, began - launched)


async def _bare(servers: Servers, rows: Sequence[Row]) -> float:
    """Seconds that bare inserts of the messages take, in batches of as many turns, each a transaction of its own."""
    connection = await asyncpg.connect(servers.postgres.url)
    await connection.execute(TABLES)
    await connection.execute(INSERT_SESSIONS, list({row.session_id for row in rows}), AGENT_ID)
    step = 2 * BATCH
    batches = [[list(column) for column in zip(*rows[i : i + step], strict=True)] for i in range(0, len(rows), step)]
    began = perf_counter()
    for batch in batches:
        await connection.execute(INSERT, *batch)
    seconds = perf_counter() - began
    await connection.execute(DROP)
    await connection.close()
    return seconds


async def _lag(cores: set[int], seconds: float) -> Lag:
    """The age of the oldest record on the outbox, looked at all the time while a pod has all the visitors it can take."""
    with own_servers(**PRODUCTION) as servers:
        await fill_gateway(servers, 2000, 50)
        client: Any = Redis.from_url(servers.redis.url, protocol=2)
        outbox = Stores(load_settings(servers.environment)).keys.outbox(0)
        with serve("message", servers, cores) as serving:
            plan = plan_for(serving, range(2000), connections=32)
            await load(plan, 2)
            loading = asyncio.create_task(load(plan, seconds))
            ages: list[float] = []
            while not loading.done():
                ages.append(await _age_ms(client, outbox))
                await asyncio.sleep(SAMPLE_S)
            measured = await loading
        await client.aclose()
    # The first and the last are of a load that begins, or has ended.
    ordered = sorted(ages[len(ages) // 10 : -len(ages) // 10])
    return Lag(
        len(measured.latencies_ms) / measured.seconds, median(ordered), ordered[len(ordered) * 99 // 100], ordered[-1]
    )


async def _age_ms(client: Any, outbox: str) -> float:
    oldest = await client.xrange(outbox, count=1)
    seconds, micros = await client.time()
    return float(seconds * 1000 + micros / 1000 - int(oldest[0][0].split(b"-")[0])) if oldest else 0.0
