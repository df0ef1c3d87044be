"""A plain TCP balancer on the loopback: each new connection goes to the next of its targets."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import cycle

from gateway.dev.servers.ports import HOST


class Balancer:
    """`went_to` is the target's port by the client's own port, for every connection so far."""

    def __init__(self, ports: Sequence[int]) -> None:
        self._next = cycle(ports)
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()
        self.went_to: dict[int, int] = {}

    @property
    def url(self) -> str:
        assert self._server is not None
        return f"http://{HOST}:{self._server.sockets[0].getsockname()[1]}"

    def send_to(self, *ports: int) -> None:
        """The targets from now on, as when health checks have taken one out."""
        self._next = cycle(ports)

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, HOST, 0)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        for task in self._open:
            task.cancel()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._open.add(task)
        port = next(self._next)
        self.went_to[writer.get_extra_info("peername")[1]] = port
        target_reader, target_writer = await asyncio.open_connection(HOST, port)
        ways = [
            asyncio.create_task(_copy(reader, target_writer)),
            asyncio.create_task(_copy(target_reader, writer)),
        ]
        try:
            # Either side that closes closes both: a client that was cut is gone for the pod too.
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            for end in (writer, target_writer):
                end.close()
            self._open.discard(task)


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def balancer_before(*ports: int) -> AsyncIterator[Balancer]:
    """A balancer before pods on these ports."""
    balancer = Balancer(ports)
    await balancer.start()
    try:
        yield balancer
    finally:
        await balancer.stop()
