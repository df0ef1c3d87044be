"""Measures on servers of its own, and leaves figures, plots and profiles in .bench.

`scripts/bench turns` (bench_turns.py): what a turn costs, beside the limit and beside what else could be used.
`scripts/bench growth` (bench_growth.py): the same as sessions, histories and open streams grow.
`scripts/bench flush` (bench_flush.py): how fast a worker is, beside bare inserts, and how far behind.
`scripts/bench sizing` (bench_sizing.py): pods, workers, memory and disk for a load, computed from those three.
`scripts/bench profile` (bench_profile.py): where the time of a turn goes in a pod.
`scripts/bench streams`: how much later than the graph's own a visitor's first text is, and what open streams cost.
`scripts/bench drain` (bench_drain.py): turns are queued while Postgres is down; what happens when it is back.
`scripts/bench flood` (bench_flood.py): what visitors notice of others who send ten times what their limit allows.
"""

import argparse
import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import structlog
import uvloop
from bench_drain import measure_drain
from bench_flood import measure_flood
from bench_flush import measure_flush
from bench_growth import measure_growth
from bench_profile import measure_profile
from bench_servers import KEY, gateway, own_servers
from bench_sizing import measure_sizing
from bench_turns import measure_turns
from redis.asyncio import Redis

from gateway.dev.servers.ports import HOST
from gateway.dev.servers.redis import RedisServer
from gateway.graphs.contract import GraphInput
from gateway.graphs.graphs import Graphs
from gateway.graphs.loading import load_graphs
from gateway.streams.events import Event, TextDelta
from persistence.model.agents import Agent, AgentDefinition

CHUNKS = 20
DELAY_MS = 200
AGENT = AgentDefinition(graph="echo", config={"chunks": CHUNKS, "delay_ms": DELAY_MS}, rate_limit=None)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_speed(commands)
    _add_others(commands)
    options = parser.parse_args()
    # What this process does by itself, filling stores above all, is not what is watched here.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(options.run(options))


def _add_speed(commands: Any) -> None:
    turns = commands.add_parser("turns", help="what a turn costs, beside what else could be used")
    turns.add_argument("--rows", default="", help="rows, comma-separated (all)")
    turns.add_argument("--histories", default="0,50,200", help="stored messages of each session (0,50,200)")
    turns.add_argument("--rounds", type=int, default=9, help="rounds (9)")
    turns.add_argument("--seconds", type=float, default=1.5, help="seconds that a row is measured each time (1.5)")
    turns.add_argument("--warm-up", type=float, default=2, help="seconds before that (2)")
    turns.add_argument("--sessions", type=int, default=2000, help="sessions (2,000)")
    turns.add_argument("--connections", type=int, default=32, help="connections (32)")
    turns.add_argument("--no-paced", action="store_true", help="leave out the load that arrives at a fixed rate")
    turns.add_argument("--verbose", action="store_true", help="print each measurement of each round")
    turns.set_defaults(run=measure_turns)
    growth = commands.add_parser("growth", help="what a turn costs as sessions, histories and open streams grow")
    growth.add_argument("--parts", default="sessions,history,streams", help="what grows (sessions,history,streams)")
    growth.add_argument(
        "--sessions", default="1000,10000,100000,1000000", help="sessions in Redis (1000,10000,100000,1000000)"
    )
    growth.add_argument("--histories", default="0,50,200,500,2000", help="stored messages of a session (0,50,200,500,2000)")
    growth.add_argument("--streams", default="0,100,1000", help="open streams (0,100,1000)")
    growth.add_argument("--rounds", type=int, default=9, help="rounds, all sizes in turn (9)")
    growth.add_argument("--seconds", type=float, default=1.5, help="seconds of each (1.5)")
    growth.add_argument("--warm-up", type=float, default=2, help="seconds before that (2)")
    growth.set_defaults(run=measure_growth)
    flush = commands.add_parser("flush", help="how fast a worker is, beside bare inserts")
    flush.add_argument("--turns", type=int, default=50_000, help="turns of each round (50,000)")
    flush.add_argument("--rounds", type=int, default=3, help="rounds (3)")
    flush.add_argument("--lag-seconds", type=float, default=10, help="seconds for which the lag is looked at (10)")
    flush.set_defaults(run=measure_flush)
    sizing = commands.add_parser(
        "sizing", help="pods, workers, memory and disk for a load, from the last turns, growth and flush"
    )
    sizing.add_argument("--readme", action="store_true", help="write the tables into the README")
    sizing.set_defaults(run=measure_sizing)
    profile = commands.add_parser("profile", help="where the time of a turn goes: a flame graph and lists")
    profile.add_argument(
        "--row", default="message", choices=("message", "stream", "limit", "first", "rows"), help="what is looked at"
    )
    profile.add_argument("--history", type=int, default=50, help="stored messages of each session (50)")
    profile.add_argument("--seconds", type=float, default=10, help="seconds of each of two recordings (10)")
    profile.add_argument("--native", action="store_true", help="functions in C too")
    profile.set_defaults(run=measure_profile)


def _add_others(commands: Any) -> None:
    streams = commands.add_parser("streams", help="first token, and the cost of open streams")
    streams.add_argument("--rounds", type=int, default=200, help="turns measured each way (200)")
    streams.add_argument("--open", type=int, default=500, help="idle streams held open (500)")
    streams.set_defaults(run=measure_streams)
    drain = commands.add_parser("drain", help="how fast what waited for Postgres arrives")
    drain.add_argument("--turns", type=int, default=100_000, help="turns that wait (100,000)")
    drain.set_defaults(run=measure_drain)
    flood = commands.add_parser("flood", help="what a flood from others costs normal visitors")
    flood.add_argument("--rounds", type=int, default=7, help="rounds, calm and flood in turn (7)")
    flood.add_argument("--seconds", type=float, default=10, help="seconds of each (10)")
    flood.add_argument("--visitors", type=int, default=50, help="normal visitors (50)")
    flood.add_argument("--per-s", type=float, default=60, help="messages a second of all visitors together (60)")
    flood.add_argument("--flooders", type=int, default=1, help="addresses that flood (1)")
    flood.add_argument("--times", type=float, default=10, help="how many times its limit each sends (10)")
    flood.add_argument("--delay-ms", type=float, default=0, help="time that the agent takes (0)")
    flood.set_defaults(run=measure_flood)


@asynccontextmanager
async def request(
    port: int, method: str, path: str, body: object = None, headers: Mapping[str, str] = {}
) -> AsyncIterator[asyncio.StreamReader]:
    """One HTTP request on a connection of its own; gives the reader behind the answer's headers."""
    reader, writer = await asyncio.open_connection(HOST, port)
    content = b"" if body is None else json.dumps(body).encode()
    fields = {"Host": HOST, "Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    writer.write(f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content)
    try:
        answer = (await reader.readuntil(b"\r\n\r\n")).decode()
        if not answer.split(" ")[1].startswith("2"):
            raise RuntimeError(f"{method} {path}: {answer.splitlines()[0]}")
        yield reader
    finally:
        writer.close()


async def measure_streams(options: argparse.Namespace) -> None:
    """Prints the first token's time by the graph alone and behind a pod, and the memory of idle streams."""
    with own_servers() as servers, gateway("serve", servers) as process_id:
        port = int(servers.environment["GATEWAY_PORT"])
        for _ in range(200):
            try:
                async with request(port, "GET", "/healthz"):
                    break
            except OSError:
                await asyncio.sleep(0.1)
        definition = {"graph": "echo", "config": AGENT.config, "rate_limit": None}
        async with request(port, "PUT", "/api/agents/bench", definition, {"Authorization": f"Bearer {KEY}"}):
            pass
        graphs = await load_graphs(None)
        alone, served = [], []
        for number in range(options.rounds + 5):
            times = await first_token_alone(graphs), await first_token_served(port, number)
            # The first few warm up.
            if number >= 5:
                alone.append(times[0])
                served.append(times[1])
        print(f"first token, median of {options.rounds} turns each way, in turn:")
        print(f"  the graph alone      {median(alone):7.2f} ms")
        print(f"  behind the gateway   {median(served):7.2f} ms   (request sent to first text.delta read)")
        print(f"  difference           {median(served) - median(alone):7.2f} ms")
        await idle_streams(port, process_id, servers.redis, options.open)


async def first_token_alone(graphs: Graphs) -> float:
    """Milliseconds from the call of the graph to its first text."""
    began = perf_counter()
    first: list[float] = []

    def emit(event: Event) -> None:
        if isinstance(event, TextDelta) and not first:
            first.append((perf_counter() - began) * 1000)

    graph_input = GraphInput([], "Hello there", "1", {}, {}, "session_of_the_bench", "text")
    await graphs.run(Agent("id", "bench", AGENT), graph_input, emit)
    return first[0]


async def first_token_served(port: int, number: int) -> float:
    """Milliseconds from sending the request, on a connection that is open, to its first text.

    The session is there already, as it is for every message but a visitor's first.
    """
    body = {"message": "Hello there", "session_id": f"session_bench_{number % 10:06d}"}
    began = perf_counter()
    async with request(port, "POST", "/api/chat/bench/stream", body) as reader:
        await reader.readuntil(b"event: text.delta\n")
        first = (perf_counter() - began) * 1000
        await reader.readuntil(b"event: turn.completed\n")
    return first


def resident_kb(process_id: int) -> int:
    """Resident memory of a process in KB."""
    status = Path(f"/proc/{process_id}/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))


async def idle_streams(port: int, process_id: int, redis: RedisServer, count: int) -> None:
    """Prints what `count` idle streams of sessions cost a pod."""
    for number in range(10):
        await first_token_served(port, number)
    client = Redis.from_url(redis.url, protocol=2)
    before = resident_kb(process_id)
    async with AsyncExitStack() as stack:
        for number in range(count):
            path = f"/api/sessions/session_bench_{number % 10:06d}/events"
            await stack.enter_async_context(request(port, "GET", path))
        await asyncio.sleep(2)
        after = resident_kb(process_id)
        subscribers = [one for one in await client.client_list() if int(one["sub"]) > 0]
        everything = len(await client.client_list())
        print(f"{count} idle streams of sessions on one pod:")
        print(f"  memory               {(after - before) / count:7.1f} KB each")
        print(f"  Redis connections    {everything - 1:4d} in all, {len(subscribers)} subscribed")
    await client.aclose()


if __name__ == "__main__":
    main()
