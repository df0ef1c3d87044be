"""What a turn costs as sessions in Redis, stored messages and open streams grow: `scripts/bench growth`.

All sizes of a kind have stores of their own, filled before; the rounds go through them up and down, with the same pod, so
that the smallest and the largest are compared in one run.
"""

import argparse
import asyncio
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from statistics import median
from typing import Any

import msgspec
from bench_measure import PRODUCTION, Result, Serving, load, measure, plan_for, serve, take_cores
from bench_results import Target, machine, print_targets, save
from bench_seed import AGENT, DOMAIN, fill_gateway, session_id, token
from bench_servers import Servers, own_servers
from redis.asyncio import Redis

from gateway.servers import HOST

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
        match part:
            case "sessions":
                grown = await _sessions(_numbers(options.sessions), options, cores)
                first, last = grown[0], grown[-1]
                for name, ratio in (
                    ("turns/s", first.turns_per_s / last.turns_per_s),
                    ("server's CPU", last.server_ms / first.server_ms),
                    ("Redis' CPU", last.redis_ms / first.redis_ms),
                ):
                    words = f"cost of a turn by {name}, {last.size:,} sessions to {first.size:,}"
                    goals.append(Target.at_most(words, ratio, MOST_SLOWER))
            case "history":
                grown = await _histories(_numbers(options.histories), options, cores)
            case "streams":
                grown = await _streams(_numbers(options.streams), options, cores)
            case _:
                raise SystemExit(f"bench: {part} does not grow; sessions, history and streams do")
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


async def _sessions(counts: Sequence[int], options: argparse.Namespace, cores: set[int]) -> list[Size]:
    """Small sessions: a turn each, of which the graph is given nothing, so that a session costs the same whenever it is
    spoken to again."""
    definition = msgspec.structs.replace(AGENT, history_window=0)
    async with AsyncExitStack() as stack:
        filled = []
        for count in counts:
            servers = stack.enter_context(own_servers(REDIS, **PRODUCTION))
            each = await _fill(servers, count, 2, definition=definition, question="Where is it?", answer="On its way.")
            spoken_to = random.Random(7).sample(range(1, count), min(count - 1, SPOKEN_TO))  # noqa: S311  # the same each time
            filled.append((count, servers, spoken_to, each))
        rounds: dict[int, list[Result]] = {count: [] for count in counts}
        for number in range(options.rounds):
            for count, servers, spoken_to, _each in filled[:: -1 if number % 2 else 1]:
                with serve("message", servers, cores) as serving:
                    rounds[count].append(await _measured(serving, spoken_to, options))
        return [_size("sessions", count, rounds[count], each) for count, _servers, _spoken_to, each in filled]


async def _histories(lengths: Sequence[int], options: argparse.Namespace, cores: set[int]) -> list[Size]:
    """Messages are hot as far as the agent's window reaches (50), the others are in Postgres, as the gateway leaves them."""
    async with AsyncExitStack() as stack:
        filled = []
        for length in lengths:
            servers = stack.enter_context(own_servers(REDIS, **PRODUCTION))
            filled.append((length, servers, await _fill(servers, SESSIONS_WITH_HISTORY, length)))
        rounds: dict[int, list[Result]] = {length: [] for length in lengths}
        for number in range(options.rounds):
            for length, servers, _each in filled[:: -1 if number % 2 else 1]:
                with serve("message", servers, cores) as serving:
                    rounds[length].append(await _measured(serving, range(SESSIONS_WITH_HISTORY), options))
        return [_size("history", length, rounds[length], each) for length, _servers, each in filled]


async def _streams(counts: Sequence[int], options: argparse.Namespace, cores: set[int]) -> list[Size]:
    """Open streams of sessions (GET …/events: second tabs), on which nothing happens, while others are spoken to."""
    rounds: dict[int, list[Result]] = {count: [] for count in counts}
    with own_servers(REDIS, **PRODUCTION) as servers:
        await fill_gateway(servers, STREAM_SESSIONS + max(counts), 50)
        for number in range(options.rounds):
            for count in counts[:: -1 if number % 2 else 1]:
                with serve("message", servers, cores) as serving:
                    async with _opened(serving, range(STREAM_SESSIONS, STREAM_SESSIONS + count)):
                        rounds[count].append(await _measured(serving, range(STREAM_SESSIONS), options))
    return [_size("streams", count, rounds[count], 0) for count in counts]


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


async def _measured(serving: Serving, numbers: range | list[int], options: argparse.Namespace) -> Result:
    plan = plan_for(serving, numbers, connections=CONNECTIONS)
    await load(plan, options.warm_up)
    result, _began, _ended = await measure(serving, plan, 0, options.seconds)
    return result


def _size(part: str, size: int, results: Sequence[Result], bytes_each: float) -> Size:
    turns_per_s, server_ms, redis_ms = (
        median(getattr(one, name) for one in results) for name in ("turns_per_s", "server_ms", "redis_ms")
    )
    return Size(part, size, turns_per_s, server_ms, redis_ms, bytes_each)
