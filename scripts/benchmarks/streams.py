"""How much later a visitor has the first text than the graph, and what idle streams cost: `scripts/bench streams`."""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from statistics import median
from time import perf_counter

from redis.asyncio import Redis

from gateway.dev.servers.ports import HOST
from gateway.dev.servers.redis import RedisServer
from gateway.graphs.contract import GraphInput
from gateway.graphs.graphs import Graphs
from gateway.graphs.loading import load_graphs
from gateway.streams.events import Event, TextDelta
from persistence.model.agents import Agent, AgentDefinition
from scripts.benchmarks.servers import KEY, gateway, own_servers

CHUNKS = 20
DELAY_MS = 200
AGENT = AgentDefinition(graph="echo", config={"chunks": CHUNKS, "delay_ms": DELAY_MS}, rate_limit=None)


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
