"""A TCP link to a server that can be frozen, cut, slowed down or made to lie: what networks do, on loopback."""

import asyncio
import re
from random import Random
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from gateway.dev.servers.ports import HOST

SCRIPT = re.compile(rb"\*\d+\r\n\$7\r\nEVALSHA\r\n\$40\r\n([0-9a-f]{40})\r\n")
"""The beginning of a request that runs a script, with the script's digest."""
ECHO = re.compile(rb"\*\d+\r\n\$\d+\r\n[^\r]*\r\n\$\d+\r\n([^\r]*)\r\n")
"""The beginning of a script's reply: its word, and the session that it is about."""


class Link:
    """Forwards connections to the server of `url`.

    `freeze` lets nothing through, in either direction, while connections stay open and new ones are accepted: as when a
    network swallows packets. `lose_replies` counts replies that are thrown away with the connection they came on.

    By `chance`, for each request: `cut_share` of them are passed on and the connection is cut before the reply;
    `swallow_share` of them are passed on and nothing comes back on their connection any more; replies are late by up to
    `delay_s`; before `plant_share` of them comes `stray`. `overheard` is the last whole reply that holds `wanted`.

    `misplace` counts replies to scripts in whose place comes another one: the last that the same script gave about another
    session, if it holds `wanted`. `misplaced` counts those that were.
    """

    def __init__(self, url: str, chance: Random | None = None, wanted: bytes = b"\0") -> None:
        self._target = url
        self._chance = chance or Random(0)
        self._wanted = wanted
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._clients: set[asyncio.StreamWriter] = set()
        self._muted: set[asyncio.StreamWriter] = set()
        self._asked: dict[asyncio.StreamWriter, bytes] = {}
        self._replied: dict[bytes, bytes] = {}
        self.lose_replies = 0
        self.cut_share = 0.0
        self.swallow_share = 0.0
        self.delay_s = 0.0
        self.plant_share = 0.0
        self.misplace = 0
        self.misplaced = 0
        self.stray = b""
        self.overheard = b""

    @property
    def url(self) -> str:
        """The server's URL by way of the link."""
        assert self._server is not None, "not open"
        parts = urlsplit(self._target)
        credentials, at, _ = parts.netloc.rpartition("@")
        port = self._server.sockets[0].getsockname()[1]
        return parts._replace(netloc=f"{credentials}{at}{HOST}:{port}").geturl()

    def lead_to(self, url: str) -> None:
        """Leads new connections to another server, as a name does that moves; those that are open stay where they are."""
        self._target = url

    def freeze(self) -> None:
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

    def heal(self) -> None:
        """Ends every trouble; a connection that has fallen silent is cut, so that nobody waits on it any more."""
        for writer in self._muted:
            writer.transport.abort()
        self.lose_replies = self.misplace = 0
        self.cut_share = self.swallow_share = self.plant_share = self.delay_s = 0.0
        self.thaw()

    def plant_now(self, stray: bytes) -> None:
        """Sends a reply that nobody asked for on every open connection."""
        for writer in self._clients:
            if not writer.is_closing():
                writer.write(stray)

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, HOST, 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        parts = urlsplit(self._target)
        try:
            there_reader, there_writer = await asyncio.open_connection(parts.hostname, parts.port)
        except OSError:
            writer.transport.abort()
            return
        ends = {writer, there_writer}
        self._writers |= ends
        self._clients.add(writer)
        ways = [
            asyncio.create_task(self._requests(reader, there_writer, writer)),
            asyncio.create_task(self._replies(there_reader, writer)),
        ]
        for task in ways:
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await asyncio.wait(ways)
        self._writers -= ends
        self._clients.discard(writer)
        self._muted.discard(writer)
        self._asked.pop(writer, None)

    async def _requests(
        self, reader: asyncio.StreamReader, server: asyncio.StreamWriter, client: asyncio.StreamWriter
    ) -> None:
        try:
            while data := await reader.read(65536):
                await self._flowing.wait()
                # No draw without need: a run from a seed stays the same with a fault more or less.
                if self.swallow_share and self._chance.random() < self.swallow_share:
                    self._muted.add(client)
                cut = self.cut_share and self._chance.random() < self.cut_share
                if cut:
                    self._muted.add(client)
                if self.plant_share and self._chance.random() < self.plant_share:
                    client.write(self.stray)
                script = SCRIPT.match(data)
                self._asked[client] = script[1] if script else b""
                server.write(data)
                await server.drain()
                if cut:
                    client.transport.abort()
                    return
        except OSError:
            return
        finally:
            # Closed, not aborted: what was written is still sent, so that a request that was cut off is carried out.
            server.close()

    def _in_place_of(self, reply: bytes, script: bytes) -> bytes:
        """What is passed on as the reply to a script: itself, or while replies are misplaced one about another session."""
        other, about = self._replied.get(script), ECHO.match(reply)
        if not script or not about:
            return reply
        self._replied[script] = reply
        named = ECHO.match(other) if other else None
        if self.misplace == 0 or other is None or named is None or named[1] == about[1]:
            return reply
        self.misplace -= 1
        self.misplaced += 1
        return other

    async def _replies(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                await self._flowing.wait()
                if self.lose_replies > 0:
                    self.lose_replies -= 1
                    return
                if self._wanted in data and data.startswith(b"*") and data.endswith(b"\r\n"):
                    self.overheard = data
                    data = self._in_place_of(data, self._asked.get(client, b""))
                if self.delay_s:
                    await asyncio.sleep(self._chance.uniform(0, self.delay_s))
                if client in self._muted:
                    continue
                client.write(data)
                await client.drain()
        except OSError:
            return
        finally:
            client.transport.abort()
