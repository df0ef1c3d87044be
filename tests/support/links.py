"""A TCP link to a server that can be frozen, cut, or made to lose replies: what networks do, on loopback."""

import asyncio
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

from gateway.servers import HOST


class Link:
    """Forwards connections to the server of `url`.

    `freeze` lets nothing through, in either direction, while connections stay open and new ones are accepted: as when a
    network swallows packets. `lose_replies` counts replies that are thrown away with the connection they came on.
    """

    def __init__(self, url: str) -> None:
        self._target = url
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.lose_replies = 0

    @property
    def url(self) -> str:
        """The server's URL by way of the link."""
        assert self._server is not None, "not open"
        parts = urlsplit(self._target)
        credentials, at, _ = parts.netloc.rpartition("@")
        port = self._server.sockets[0].getsockname()[1]
        return parts._replace(netloc=f"{credentials}{at}{HOST}:{port}").geturl()

    def freeze(self) -> None:
        self._flowing.clear()

    def thaw(self) -> None:
        self._flowing.set()

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
        self._writers.add(writer)
        try:
            there_reader, there_writer = await asyncio.open_connection(parts.hostname, parts.port)
        except OSError:
            writer.transport.abort()
            return
        self._writers.add(there_writer)
        for source, target, replies in ((reader, there_writer, False), (there_reader, writer, True)):
            task = asyncio.create_task(self._pump(source, target, replies=replies))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, replies: bool) -> None:
        try:
            while data := await reader.read(65536):
                await self._flowing.wait()
                if replies and self.lose_replies > 0:
                    self.lose_replies -= 1
                    return
                writer.write(data)
                await writer.drain()
        except OSError:
            return
        finally:
            writer.transport.abort()
