"""What a turn costs, beside the limit and beside what else could be used: `scripts/bench turns`.

The server under test has one core to itself; the load, Redis, Postgres and the worker share the others. All rows are there
at the same time, each on stores of its own, and loaded in turn for a moment each, round after round, while the others are
stopped: a machine's speed moves by a third within seconds, and what is compared has to have met the same moments. The table
has the medians of the rounds; how many times faster one is than another is the median of that in each round.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from statistics import median
from time import monotonic
from typing import Any, NamedTuple

import asyncpg
from redis.asyncio import Redis

from scripts.benchmarks.check import check
from scripts.benchmarks.load import Plan
from scripts.benchmarks.measure import (
    BESIDE,
    FOLDER,
    GATEWAY,
    PRODUCTION,
    STATELESS,
    Result,
    Serving,
    Span,
    add_pauses,
    asleep,
    awake,
    load,
    measure,
    plan_for,
    serve,
    take_cores,
    up_and_down,
)
from scripts.benchmarks.plot import plot
from scripts.benchmarks.ratios import ratio_lines
from scripts.benchmarks.results import Target, machine, print_targets, save
from scripts.benchmarks.seed import fill_gateway, fill_langgraph_dev, fill_peer
from scripts.benchmarks.servers import ROOT, Servers, own_servers

ROWS = {
    "limit": "the limit: Starlette, LangGraph, no state",
    "limit-tuned": "the limit, collector as the gateway's",
    "message": "gateway /message",
    "beside-message": "the other checkout's gateway /message",
    "stream": "gateway /stream",
    "beside-stream": "the other checkout's gateway /stream",
    "first": "FastAPI, SQLAlchemy, one JSONB column",
    "rows": "Starlette, asyncpg, a row per message",
    "saver-exit": "AsyncPostgresSaver, durability exit",
    "saver-async": "AsyncPostgresSaver, durability async",
    "langgraph-dev": "langgraph dev, in memory",
}
QUICK = ("limit", "limit-tuned", "message", "beside-message", "stream", "beside-stream")
SHARE = 0.8
FEWER_THREADS = 640
"""`langgraph dev` goes through all of its threads for each run: it is given fewer, with which it is faster."""
MAX_PAUSE_MS = 20
LEAST = (
    (0, "limit", 0.70),
    (50, "limit", 0.60),
    (200, "limit", 0.60),
    (50, "first", 3.0),
    (200, "first", 5.0),
    (50, "saver-exit", 2.0),
    (50, "langgraph-dev", 5.0),
)
"""How many times the turns/s of a row, at a history length, the gateway's have to be."""


class RoundTrips(NamedTuple):
    """How often a turn goes to Redis, and how many scripts it calls there."""

    reads: float
    calls: float


class Counts(NamedTuple):
    """How much a load was, and what Redis counted of it."""

    turns: int
    seconds: float
    reads: int
    calls: int


async def measure_turns(options: argparse.Namespace) -> None:
    """Prints the table, and writes it as JSON and as a plot into .bench."""
    rows = _rows(options)
    histories = [int(one) for one in (options.histories or ("50" if options.quick else "0,50,200")).split(",")]
    cores = take_cores()
    began = monotonic()
    results: list[Result] = []
    paced_results: list[Result] = []
    for history in histories:
        closed, paced = await _measure(rows, history, options, cores)
        results += closed
        paced_results += paced
        print("\n".join(["", *HEAD, *map(_line, _medians(closed))]), flush=True)
        print("\n".join(["", *ratio_lines(closed, ROWS)]), flush=True)
        if paced:
            print(f"arriving at a fixed rate, {SHARE:.0%} of what the gateway can do so at most:")
            print("\n".join(map(_line, _medians(paced))), flush=True)
    medians = _medians(results)
    trips = await _round_trips(options, cores) if "message" in rows and not options.quick else None
    found = machine()
    print(f"\n{found}")
    print("the server has a core to itself; medians of", f"{options.rounds} rounds of {options.seconds:g} s;", end=" ")
    print(f"{options.sessions:,} sessions, {options.connections} connections")
    if trips:
        print(f"a turn with the worker stopped: {trips.reads:.2f} round trips to Redis, {trips.calls:.2f} calls of scripts")
    if options.quick:
        save("turns-quick", {"machine": found, "rounds": results})
        print(f"\nin .bench: turns-quick.json; took {monotonic() - began:.0f} s")
        return
    goals = targets(results, paced_results, trips)
    print_targets(goals)
    figures = {"medians": medians, "paced": _medians(paced_results), "round_trips": trips, "targets": goals}
    save("turns", {"machine": found, **figures, "rounds": results, "paced_rounds": paced_results})
    bars: dict[str, list[tuple[str, float]]] = {}
    for one in medians:
        bars.setdefault(ROWS[one.row], []).append((f"{one.history} messages", one.turns_per_s))
    (FOLDER / "turns.svg").write_text(
        plot("Turns per second on one core, by stored messages", bars, [ROWS["message"], ROWS["stream"]])
    )
    print(f"\nin .bench: turns.json, turns.svg; took {(monotonic() - began) / 60:.0f} min")


def _rows(options: argparse.Namespace) -> list[str]:
    """What is measured: the rows that were asked for, or those of a quick comparison, or all."""
    rows = options.rows.split(",") if options.rows else list(QUICK if options.quick else ROWS)
    if unknown := set(rows) - set(ROWS):
        sys.exit(f"bench: no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    if options.beside is None:
        return [row for row in rows if not row.startswith(BESIDE)]
    options.beside = options.beside.resolve()
    if not (options.beside / "gateway" / "__main__.py").is_file():
        sys.exit(f"bench: {options.beside} is no checkout of the gateway")
    return rows


class Ready(NamedTuple):
    """A row that is served, and what its visitors send."""

    serving: Serving
    plan: Plan


async def _measure(
    rows: Sequence[str], history: int, options: argparse.Namespace, cores: set[int]
) -> tuple[list[Result], list[Result]]:
    """Each row in each round, in a closed loop; then the gateway and the limit under a load that arrives at a fixed rate.

    In a closed loop visitors come to be in step: each part of a turn is done for all of them at once, from warm caches.
    Arriving at a fixed rate they are not, and a turn costs more. So what is the most there is measured for itself, as what
    is answered when as many arrive as the closed loop had answered.
    """
    stores, servers = ExitStack(), ExitStack()
    with stores:
        with servers:
            ready = {row: await _serve(row, history, options, cores, stores, servers) for row in rows}
            servers.enter_context(asleep([one.serving for one in ready.values()]))
            spans = [await _slice(ready[row], history, options) for row in up_and_down(rows, options.rounds)]
            paced = []
            if not (options.no_paced or options.quick) and {"limit", "message"} <= set(rows):
                closed_loop = median(one.turns_per_s for one, _, _ in spans if one.row == "message")
                more = [await _slice(ready["message"], history, options, closed_loop) for _ in range(options.rounds)]
                rate = SHARE * median(one.turns_per_s for one, _, _ in more)
                pair = up_and_down(("limit", "message"), options.rounds)
                paced = [await _slice(ready[row], history, options, rate) for row in pair]
        # A server writes down its collector's pauses when it ends.
        return _with_pauses(spans, ready), _with_pauses(paced, ready)


def _with_pauses(spans: Sequence[Span], ready: Mapping[str, Ready]) -> list[Result]:
    return [add_pauses(span, ready[span.result.row].serving.servers) for span in spans]


async def _serve(
    row: str, history: int, options: argparse.Namespace, cores: set[int], stores: ExitStack, running: ExitStack
) -> Ready:
    """One row, warm, on stores of its own."""
    checkout = options.beside if row.startswith(BESIDE) else ROOT
    servers = stores.enter_context(own_servers({}, checkout, **PRODUCTION))
    await _assert_durable(servers)
    if row in GATEWAY:
        await fill_gateway(servers, options.sessions, history)
    elif row not in STATELESS and row != "langgraph-dev":
        await fill_peer(servers, row, options.sessions, history)
    serving = running.enter_context(serve(row, servers, cores, checkout=checkout))
    sessions, threads = options.sessions, None
    if row == "langgraph-dev":
        sessions = min(sessions, FEWER_THREADS)
        threads = await fill_langgraph_dev(serving.port, sessions, history)
    plan = plan_for(serving, range(sessions), connections=options.connections, threads=threads)
    await check(serving, plan, history)
    await load(plan, options.warm_up)
    return Ready(serving, plan)


async def _slice(ready: Ready, history: int, options: argparse.Namespace, rate: float = 0) -> Span:
    async with awake(ready.serving):
        span = await measure(ready.serving, ready.plan, history, options.seconds, rate)
    if options.verbose:
        print(_line(span.result), flush=True)
    return span


async def _assert_durable(servers: Servers) -> None:
    """That both stores keep what they have said yes to."""
    client: Any = Redis.from_url(servers.redis.url, protocol=2, decode_responses=True)
    connection = await asyncpg.connect(servers.postgres.url)
    kept = {
        **await client.config_get("append*"),
        **{name: await connection.fetchval(f"SHOW {name}") for name in ("fsync", "synchronous_commit", "full_page_writes")},
    }
    await client.aclose()
    await connection.close()
    wanted = {
        "appendonly": "yes",
        "appendfsync": "everysec",
        "fsync": "on",
        "synchronous_commit": "on",
        "full_page_writes": "on",
    }
    if wrong := {name: kept[name] for name in wanted if kept[name] != wanted[name]}:
        raise RuntimeError(f"not durable: {wrong}")


async def _round_trips(options: argparse.Namespace, cores: set[int]) -> RoundTrips:
    """Redis' own counts, worker stopped, of a slow load and of a faster one: what a pod does in the background it does by
    the second, and not by the turn."""
    with own_servers(**PRODUCTION) as servers:
        await fill_gateway(servers, options.sessions, 50)
        client: Any = Redis.from_url(servers.redis.url, protocol=2)
        with serve("message", servers, cores, worker=False) as serving:
            plan = plan_for(serving, range(options.sessions), connections=options.connections)
            await load(plan, 1, 100)
            slow, fast = [await _count(client, plan, rate) for rate in (50, 350)]
        await client.aclose()
    whole = slow.turns * fast.seconds - fast.turns * slow.seconds
    return RoundTrips(
        (slow.reads * fast.seconds - fast.reads * slow.seconds) / whole,
        (slow.calls * fast.seconds - fast.calls * slow.seconds) / whole,
    )


async def _count(client: Any, plan: Plan, rate: float) -> Counts:
    before, began = await _counted(client), monotonic()
    measured = await load(plan, 3, rate)
    after = await _counted(client)
    return Counts(len(measured.latencies_ms), monotonic() - began, after[0] - before[0], after[1] - before[1])


async def _counted(client: Any) -> tuple[int, int]:
    """What Redis has read from clients so often, and the scripts that they have called."""
    commands = await client.info("commandstats")
    calls = sum(commands.get(f"cmdstat_{name}", {"calls": 0})["calls"] for name in ("evalsha", "eval", "fcall"))
    return int((await client.info("stats"))["total_reads_processed"]), calls


def _medians(results: Sequence[Result]) -> list[Result]:
    """Of each row and history the medians of all rounds, and the longest pause of any."""
    groups: dict[tuple[str, int], list[Result]] = {}
    for one in results:
        groups.setdefault((one.row, one.history), []).append(one)
    medians = []
    for (row, history), group in groups.items():
        middle = {name: median(getattr(one, name) for one in group) for name in Result.__struct_fields__[2:]}
        medians.append(Result(row, history, **{**middle, "pause_ms": max(one.pause_ms for one in group)}))
    return medians


HEAD = (
    f"{'':<59}{'latency':^16}{'CPU ms per turn':^32}{'longest':>8}",
    f"{'':<42}{'history':>8}{'turns/s':>9}{'p50 ms':>8}{'p99 ms':>8}{'server':>8}{'Redis':>7}{'Postgres':>9}{'worker':>8}"
    f"{'gc ms':>8}",
)


def _line(one: Result) -> str:
    pause = "-" if one.row == "langgraph-dev" else f"{one.pause_ms:.1f}"
    return (
        f"{ROWS[one.row]:<42}{one.history:>8}{one.turns_per_s:>9,.0f}{one.p50_ms:>8.1f}{one.p99_ms:>8.1f}"
        f"{one.server_ms:>8.2f}{one.redis_ms:>7.2f}{one.postgres_ms:>9.2f}{one.worker_ms:>8.2f}{pause:>8}"
    )


def targets(results: Sequence[Result], paced_results: Sequence[Result], trips: RoundTrips | None) -> list[Target]:
    """What the gateway has to reach, as far as what it is compared with was measured."""
    rounds: dict[tuple[str, int], list[float]] = {}
    for one in results:
        rounds.setdefault((one.row, one.history), []).append(one.turns_per_s)
    found = []

    def times(history: int, other: str) -> float | None:
        ours, theirs = rounds.get(("message", history)), rounds.get((other, history))
        if not ours or not theirs:
            return None
        return median(our / their for our, their in zip(ours, theirs, strict=True))

    for history, other, least in LEAST:
        if ratio := times(history, other):
            found.append(Target.at_least(f"turns/s at history {history}, times {ROWS[other]}", ratio, least))
    # They were measured minutes apart, and how fast the machine was meanwhile shows best where no collector stops it.
    at_50, at_200 = times(50, "limit-tuned"), times(200, "limit-tuned")
    if at_50 and at_200:
        words = "turns/s at history 200, times itself at 50 (each as a part of the tuned limit beside it)"
        found.append(Target.at_least(words, at_200 / at_50, 0.95))
    medians, paced = _medians(results), _medians(paced_results)
    limits = {one.history: one for one in paced if one.row == "limit"}
    for one in paced:
        if one.row == "message":
            words = f"p99 at {SHARE:.0%} load, history {one.history}, ms (at most the limit's)"
            found.append(Target.at_most(words, one.p99_ms, limits[one.history].p99_ms))
    for one in medians:
        if one.row == "message":
            at = f"at history {one.history}"
            found.append(Target.at_most(f"Redis {at}, ms CPU per turn", one.redis_ms, 0.15))
            found.append(Target.at_most(f"Postgres {at}, ms CPU per turn", one.postgres_ms, 0.10))
    pauses = [one.pause_ms for one in (*medians, *paced) if one.row in ("message", "stream")]
    if pauses:
        found.append(Target.at_most("longest pause of the collector, ms", max(pauses), MAX_PAUSE_MS))
    if trips:
        found.append(Target.at_most("round trips to Redis per turn", trips.reads, 2.02))
    return found
