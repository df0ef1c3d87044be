"""A TCP proxy on the loopback before a Redis: it passes everything on, until it is told to plant a reply or to swallow."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from gateway.dev.servers.ports import HOST


class Proxy:
    """`plant` is written ahead of the next `plants` replies; while `swallowing`, no reply gets through."""

    def __init__(self, target_port: int) -> None:
        self._target_port = target_port
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], tuple[asyncio.StreamWriter, asyncio.StreamWriter]] = {}
        self.plant = b""
        self.plants = 0
        self.swallowing = False
        self.commands = 0
        self.connections = 0
        self.replies: list[bytes] = []

    @property
    def port(self) -> int:
        assert self._server is not None
        port: int = self._server.sockets[0].getsockname()[1]
        return port

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        server_reader, server_writer = await asyncio.open_connection(HOST, self._target_port)
        self._links[task] = (writer, server_writer)

        async def commands() -> None:
            while data := await reader.read(1 << 16):
                self.commands += 1
                if self.plants and b"EVAL" in data:
                    self.plants -= 1
                    writer.write(self.plant)
                server_writer.write(data)

        async def replies() -> None:
            while data := await server_reader.read(1 << 16):
                self.replies.append(data)
                if not self.swallowing:
                    writer.write(data)

        both = [asyncio.create_task(commands()), asyncio.create_task(replies())]
        try:
            with suppress(ConnectionError):
                await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in both:
                one.cancel()
            await asyncio.gather(*both, return_exceptions=True)
            for end in self._links.pop(task):
                end.close()

    def inject(self, reply: bytes) -> None:
        """Sends a reply on every connection, to nobody's question."""
        for client, _ in self._links.values():
            client.write(reply)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, 0)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        tasks = list(self._links)
        for ends in list(self._links.values()):
            for end in ends:
                end.close()
        await asyncio.gather(*tasks)


@asynccontextmanager
async def proxy_before(port: int) -> AsyncIterator[Proxy]:
    """A proxy before the Redis on this port."""
    proxy = Proxy(port)
    await proxy.start()
    try:
        yield proxy
    finally:
        await proxy.stop()
