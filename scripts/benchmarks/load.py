"""The load: visitors on keep-alive connections, one process of its own, so that its work does not count as the server's.

`python -m scripts.benchmarks.load` reads a Plan as JSON on stdin and writes what it measured as JSON on stdout.
"""

import asyncio
import sys
from time import perf_counter

import msgspec
import uvloop


class Plan(msgspec.Struct, kw_only=True):
    """What is to be sent: `bodies[i]` to `paths[i]`, with the session token `tokens[i]` if there are any, in rotation from
    about the `first` on.

    Closed loop: each connection sends its next request when the last is answered. With a `rate` (requests per second)
    they are sent at fixed times, and waited for from those times on: a server that stalls does not slow down its visitors.
    """

    port: int
    paths: list[str]
    bodies: list[str]
    tokens: list[str] = []
    headers: dict[str, str] = {}
    connections: int = 32
    seconds: float
    rate: float = 0
    first: int = 0
    stream: bool = False


class Measured(msgspec.Struct):
    """Milliseconds of each answered request, and how long the whole took. `failed` are answers that are not a 2xx."""

    seconds: float
    latencies_ms: list[float]
    failed: int
    first_failure: str


async def run(plan: Plan) -> Measured:
    """Sends what the plan says, for its time."""
    fields = {"Host": "127.0.0.1", "Content-Type": "application/json", **plan.headers}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    requests = []
    tokens = plan.tokens or [""] * len(plan.paths)
    for path, body, token in zip(plan.paths, plan.bodies, tokens, strict=True):
        content = body.encode()
        own = f"Authorization: Bearer {token}\r\n" if token else ""
        requests.append(f"POST {path} HTTP/1.1\r\n{head}{own}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    latencies: list[float] = []
    failures: list[str] = []
    began = perf_counter()
    until = began + plan.seconds
    taken = 0

    async def connection(number: int) -> None:
        nonlocal taken
        reader, writer = await asyncio.open_connection("127.0.0.1", plan.port)
        # A session belongs to one connection: its visitor waits for an answer before the next message.
        mine = requests[number :: plan.connections]
        position = plan.first // plan.connections
        while True:
            if plan.rate:
                due = began + taken / plan.rate
                taken += 1
                if due > until:
                    break
                if (wait := due - perf_counter()) > 0:
                    await asyncio.sleep(wait)
            else:
                due = perf_counter()
                if due > until:
                    break
            writer.write(mine[position % len(mine)])
            position += 1
            status = await (read_stream(reader) if plan.stream else read_answer(reader))
            latencies.append((perf_counter() - due) * 1000)
            if not status.startswith("2"):
                failures.append(status)
        writer.close()

    await asyncio.gather(*map(connection, range(plan.connections)))
    return Measured(perf_counter() - began, latencies, len(failures), failures[0] if failures else "")


async def read_answer(reader: asyncio.StreamReader) -> str:
    """Reads one whole answer; its status, with the body of one that is not a 2xx."""
    head = await reader.readuntil(b"\r\n\r\n")
    lower = head.lower()
    status = head[9:12].decode()
    at = lower.find(b"content-length:")
    if at >= 0:
        body = await reader.readexactly(int(lower[at + 15 : lower.index(b"\r\n", at)]))
    else:
        body = b""
        while chunk_head := int((await reader.readuntil(b"\r\n"))[:-2], 16):
            body += (await reader.readexactly(chunk_head + 2))[:-2]
        await reader.readexactly(2)
    return status if status.startswith("2") else f"{status} {body[:300].decode(errors='replace')}"


async def read_stream(reader: asyncio.StreamReader) -> str:
    """Reads one stream of events to its end; its status, or what it ended with instead of an answer."""
    head = await reader.readuntil(b"\r\n\r\n")
    status = head[9:12].decode()
    if not status.startswith("2"):
        return status
    tail = b""
    while size := int((await reader.readuntil(b"\r\n"))[:-2], 16):
        tail = (tail + (await reader.readexactly(size + 2))[:-2])[-4000:]
    await reader.readexactly(2)
    return status if b"event: turn.completed" in tail else f"a stream that ends with {tail[-200:].decode(errors='replace')}"


if __name__ == "__main__":
    given = msgspec.json.decode(sys.stdin.buffer.read(), type=Plan)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        sys.stdout.buffer.write(msgspec.json.encode(runner.run(run(given))))
