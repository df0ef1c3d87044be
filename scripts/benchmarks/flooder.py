"""Connections that send messages at a steady pace; as a program, a process that floods one pod.

`python -m scripts.benchmarks.flooder <port> <addresses> <times>` sends `times` what the limit of an address allows. It
imports nothing of the gateway: `scripts/bench flood` runs it beside a pod that is measured.
"""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import Callable
from functools import partial
from time import perf_counter

HOST = "127.0.0.1"
LIMIT_PER_S = 10
BURST = 600
CONNECTIONS = 10
"""Of each flooding address."""


class Line:
    """A connection that is kept alive, and one session on it."""

    def __init__(self, port: int, address: str, session_id: str) -> None:
        content = json.dumps({"message": "Where is my order?", "session_id": session_id}).encode()
        head = (
            f"POST /api/chat/bench/message HTTP/1.1\r\nHost: {HOST}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\nX-Forwarded-For: {address}\r\n\r\n"
        )
        self._request = head.encode() + content
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def send(self) -> int:
        """Sends the message; the status of the answer, which is read whole."""
        if self._streams is None:
            self._streams = await asyncio.open_connection(HOST, self._port)
        reader, writer = self._streams
        writer.write(self._request)
        head = (await reader.readuntil(b"\r\n\r\n")).lower()
        await reader.readexactly(int(head.partition(b"content-length:")[2].split(b"\r\n", 1)[0]))
        return int(head[9:12])

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


async def pace(lines: list[Line], per_s: float, seconds: float, seen: Callable[[int, float], None]) -> None:
    """Sends over all lines together `per_s` messages a second, evenly. `seen` gets each status, and the seconds since the
    message was due: waiting for a line counts."""
    began = perf_counter()

    async def one(number: int, line: Line) -> None:
        for turn in range(number, int(per_s * seconds), len(lines)):
            due = began + turn / per_s
            await asyncio.sleep(max(due - perf_counter(), 0))
            if perf_counter() - began > seconds + 1:
                return
            status = await line.send()
            seen(status, perf_counter() - due)

    await asyncio.gather(*(one(number, line) for number, line in enumerate(lines)))


async def flood(port: int, flooders: int, times: float) -> None:
    """Floods when told to by a line on standard input, for so many seconds; prints how often each status was answered."""
    addresses = [f"203.0.113.{number}" for number in range(1, flooders + 1)]
    lines = [Line(port, a, f"session_flood_{a.replace('.', '_')}_{n:03d}") for n in range(CONNECTIONS) for a in addresses]
    print("ready", flush=True)
    while seconds := (await asyncio.to_thread(sys.stdin.readline)).strip():
        await asyncio.gather(*map(_use_up, lines))
        print("flooding", flush=True)
        found: list[int] = []
        await pace(lines, times * LIMIT_PER_S * flooders, float(seconds), partial(_note, found))
        print(json.dumps(Counter(found)), flush=True)


def _note(found: list[int], status: int, _: float) -> None:
    found.append(status)


async def _use_up(line: Line) -> None:
    """Uses up the burst of a line's address, together with its other lines."""
    refused = 0
    while refused < 10:
        refused = refused + 1 if await line.send() == 429 else 0


if __name__ == "__main__":
    asyncio.run(flood(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3])))
