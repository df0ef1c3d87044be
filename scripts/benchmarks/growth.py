"""What a turn costs as sessions in Redis, stored messages and open streams grow: `scripts/bench growth`.

All sizes of a kind have stores and a pod of their own, filled before; the rounds go through them up and down, for a moment
each, so that the smallest and the largest are compared while the machine is the same.
"""

import argparse
import asyncio
import random
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median
from typing import Any, NamedTuple

import msgspec
from redis.asyncio import Redis

from gateway.dev.servers.ports import HOST
from scripts.benchmarks.measure import (
    PRODUCTION,
    Result,
    Serving,
    asleep,
    awake,
    load,
    measure,
    plan_for,
    serve,
    take_cores,
    up_and_down,
)
from scripts.benchmarks.results import Target, machine, print_targets, save
from scripts.benchmarks.seed import AGENT, DOMAIN, fill_gateway, session_id, token
from scripts.benchmarks.servers import Servers, own_servers

CONNECTIONS = 32
SPOKEN_TO = 20_000
"""Sessions that are spoken to, of those there are."""
SESSIONS_WITH_HISTORY = 500
STREAM_SESSIONS = 2000
MOST_SLOWER = 1.10
MOST_BYTES = 13_000
# A fork in the middle of a measurement would be measured too; rewriting the file is Redis' own work at any number of turns.
REDIS = {"auto-aof-rewrite-percentage": "0"}


class Size(msgspec.Struct):
    """Medians at one size of what grows; `bytes_each`: Redis' memory per session."""

    part: str
    size: int
    turns_per_s: float
    server_ms: float
    redis_ms: float
    bytes_each: float


async def measure_growth(options: argparse.Namespace) -> None:
    """Prints a table for each thing that grows, and writes all as JSON into .bench."""
    cores = take_cores()
    found = machine()
    print(found)
    sizes: list[Size] = []
    goals: list[Target] = []
    hot_bytes = await _bytes_of_hot_sessions()
    goals.append(
        Target.at_most("Redis' memory per session with 50 hot messages of 200 characters, bytes", hot_bytes, MOST_BYTES)
    )
    for part in options.parts.split(","):
        if part not in FILLED:
            raise SystemExit(f"bench: {part} does not grow; sessions, history and streams do")
        async with AsyncExitStack() as stack:
            filled = await FILLED[part](_numbers(getattr(options, OPTIONS[part])), stack)
            rounds = await _measure(filled, options, cores, stack)
        grown = [_size(part, one, results) for one, results in zip(filled, rounds, strict=True)]
        if part == "sessions":
            goals += _ratios(filled, rounds)
        sizes += grown
        _print(part, grown)
    print(f"\na session with 50 hot messages of 200 characters: {hot_bytes:,.0f} bytes of Redis' memory")
    print_targets(goals)
    save("growth", {"machine": found, "sizes": sizes, "hot_bytes": hot_bytes, "targets": goals})
    print("\nin .bench: growth.json")


def _numbers(text: str) -> list[int]:
    return [int(one) for one in text.split(",")]


def _print(part: str, grown: Sequence[Size]) -> None:
    names = {"sessions": "sessions in Redis", "history": "stored messages", "streams": "open streams"}
    print(f"\n{names[part]:>20}{'turns/s':>10}{'server, ms CPU':>17}{'Redis, ms CPU':>16}{'Redis, bytes per session':>27}")
    for one in grown:
        each = f"{one.bytes_each:,.0f}" if one.bytes_each else "-"
        print(f"{one.size:>20,}{one.turns_per_s:>10,.0f}{one.server_ms:>17.3f}{one.redis_ms:>16.3f}{each:>27}", flush=True)


async def _bytes_of_hot_sessions(count: int = 2000) -> float:
    with own_servers(REDIS, **PRODUCTION) as servers:
        return await _fill(servers, count, 50)


async def _fill(servers: Servers, sessions: int, messages: int, **details: Any) -> float:
    """Fills the stores; bytes of Redis' memory that a session takes."""
    client: Any = Redis.from_url(servers.redis.url, protocol=2)
    before = (await client.info("memory"))["used_memory"]
    await fill_gateway(servers, sessions, messages, **details)
    after = (await client.info("memory"))["used_memory"]
    await client.aclose()
    return float(after - before) / sessions


class Filled(NamedTuple):
    """Stores of one size: the sessions that are spoken to, Redis' bytes for each session, those with an open stream."""

    size: int
    servers: Servers
    numbers: range | list[int]
    bytes_each: float = 0
    streams: range = range(0)


async def _sessions(counts: Sequence[int], stack: AsyncExitStack) -> list[Filled]:
    """Small sessions: a turn each, of which the graph is given nothing, so that a session costs the same whenever it is
    spoken to again."""
    definition = msgspec.structs.replace(AGENT, history_window=0)
    filled = []
    for count in counts:
        servers = stack.enter_context(own_servers(REDIS, **PRODUCTION))
        each = await _fill(servers, count, 2, definition=definition, question="Where is it?", answer="On its way.")
        spoken_to = random.Random(7).sample(range(1, count), min(count - 1, SPOKEN_TO))  # noqa: S311  # the same each time
        filled.append(Filled(count, servers, spoken_to, each))
    return filled


async def _histories(lengths: Sequence[int], stack: AsyncExitStack) -> list[Filled]:
    """Messages are hot as far as the agent's window reaches (50), the others are in Postgres, as the gateway leaves them."""
    filled = []
    for length in lengths:
        servers = stack.enter_context(own_servers(REDIS, **PRODUCTION))
        each = await _fill(servers, SESSIONS_WITH_HISTORY, length)
        filled.append(Filled(length, servers, range(SESSIONS_WITH_HISTORY), each))
    return filled


async def _streams(counts: Sequence[int], stack: AsyncExitStack) -> list[Filled]:
    """Open streams of sessions (GET …/events: second tabs), on which nothing happens, while others are spoken to."""
    filled = []
    for count in counts:
        servers = stack.enter_context(own_servers(REDIS, **PRODUCTION))
        await fill_gateway(servers, STREAM_SESSIONS + count, 50)
        filled.append(
            Filled(count, servers, range(STREAM_SESSIONS), streams=range(STREAM_SESSIONS, STREAM_SESSIONS + count))
        )
    return filled


FILLED = {"sessions": _sessions, "history": _histories, "streams": _streams}
OPTIONS = {"sessions": "sessions", "history": "histories", "streams": "streams"}


async def _measure(
    filled: Sequence[Filled], options: argparse.Namespace, cores: set[int], stack: AsyncExitStack
) -> list[list[Result]]:
    """A pod for each size, loaded in turn for a moment each, while the others are stopped: see turns.py."""
    ready = []
    for one in filled:
        serving = stack.enter_context(serve("message", one.servers, cores))
        await stack.enter_async_context(_opened(serving, one.streams))
        plan = plan_for(serving, one.numbers, connections=CONNECTIONS)
        await load(plan, options.warm_up)
        ready.append((serving, plan, list[Result]()))
    stack.enter_context(asleep([serving for serving, _, _ in ready]))
    for serving, plan, results in up_and_down(ready, options.rounds):
        async with awake(serving):
            results.append((await measure(serving, plan, 0, options.seconds)).result)
    return [results for _, _, results in ready]


def _ratios(filled: Sequence[Filled], rounds: Sequence[Sequence[Result]]) -> list[Target]:
    """What a turn costs at the largest size, in what it costs at the smallest: the medians of the rounds' ratios."""
    pairs = list(zip(rounds[0], rounds[-1], strict=True))
    words = f"{filled[-1].size:,} sessions to {filled[0].size:,}"
    return [
        Target.at_most(f"cost of a turn by {name}, {words}", median(cost(few, many) for few, many in pairs), MOST_SLOWER)
        for name, cost in COSTS.items()
    ]


COSTS: dict[str, Callable[[Result, Result], float]] = {
    "turns/s": lambda few, many: few.turns_per_s / many.turns_per_s,
    "server's CPU": lambda few, many: many.server_ms / few.server_ms,
    "Redis' CPU": lambda few, many: many.redis_ms / few.redis_ms,
}


@asynccontextmanager
async def _opened(serving: Serving, numbers: range) -> AsyncIterator[None]:
    """A stream of each of these sessions, held open."""
    writers = []
    try:
        for number in numbers:
            reader, writer = await asyncio.open_connection(HOST, serving.port)
            writers.append(writer)
            writer.write(
                f"GET /api/sessions/{session_id(number)}/events HTTP/1.1\r\nHost: {HOST}\r\nOrigin: https://{DOMAIN}\r\n"
                f"Authorization: Bearer {token(number)}\r\n\r\n".encode()
            )
            head = await reader.readuntil(b"\r\n\r\n")
            if not head.startswith(b"HTTP/1.1 200"):
                raise RuntimeError(f"no stream: {head.decode(errors='replace').splitlines()[0]}")
        yield
    finally:
        for writer in writers:
            writer.close()


def _size(part: str, filled: Filled, results: Sequence[Result]) -> Size:
    turns_per_s, server_ms, redis_ms = (
        median(getattr(one, name) for one in results) for name in ("turns_per_s", "server_ms", "redis_ms")
    )
    return Size(part, filled.size, turns_per_s, server_ms, redis_ms, filled.bytes_each)
