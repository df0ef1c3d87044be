"""Connections to Redis on which scripts run: commands out, as many replies back, nothing left behind.

What redis-py does around a command (locks, counters, a packer in Python, a task that waits for the socket) takes longer
than the command. So its connections, which know TLS, authentication and Sentinel, are taken from its pool once and held
here. What always holds: a connection is used by one call at a time, and used again only if that call has read every reply
that it asked for; after anything else it is closed, and connects anew. On Redis Cluster redis-py's own client does it all:
it knows the slots.
"""

import asyncio
import random
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import hiredis
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ClusterDownError, ResponseError
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import TimeoutError as TimedOut

from persistence.redis.connection import REPLY_TIMEOUT_S, RETRIES, Client, call, translated

BROKEN = (Disconnected, TimedOut, ClusterDownError, OSError)
"""What may pass when it is tried again. asyncio's TimeoutError is an OSError."""

Argument = str | bytes | int | float
Command = Sequence[Argument]


class Lines(Protocol):
    """Sends commands, all to one slot, in one round trip."""

    async def ask(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        """The replies, errors among them as ResponseError. What was asked may have been done more than once. Raises
        RedisUnavailable."""
        ...


def _pause_s(attempt: int) -> float:
    """Before the next attempt: longer each time, and not the same for all who failed together."""
    return random.uniform(0, min(0.02 * 2**attempt, 0.2))  # noqa: S311


def lines(client: Client, *, concurrency: int) -> Lines:
    """The lines of a client; `concurrency` calls at a time, so that no pool ever runs out."""
    return ClusterLines(client, concurrency) if isinstance(client, RedisCluster) else HeldLines(client, concurrency)


class HeldLines:
    """Lines of a single Redis, or of one that Sentinel names."""

    def __init__(self, client: Redis, concurrency: int) -> None:
        self._pool = client.connection_pool
        self._free = asyncio.Semaphore(concurrency)
        self._idle: list[AbstractConnection] = []

    async def ask(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        packed = b"".join(
            hiredis.pack_command(tuple(command))  # type: ignore[arg-type]  # its stub says one, and means any number
            for command in commands
        )
        now = asyncio.get_running_loop().time
        deadline = now() + timeout_s
        with translated():
            # Behind a Redis that hangs many may wait, and none longer than its time.
            async with asyncio.timeout_at(deadline) if self._free.locked() else nullcontext():
                await self._free.acquire()
            try:
                attempt = 0
                while True:
                    if now() >= deadline:
                        raise TimeoutError("no connection was free in time")
                    try:
                        async with asyncio.timeout(min(deadline - now(), REPLY_TIMEOUT_S)):
                            return await self._exchange(packed, len(commands))
                    except BROKEN:
                        # Every script may be repeated: it checks an id.
                        attempt += 1
                        pause_s = _pause_s(attempt)
                        if attempt > RETRIES or now() + pause_s >= deadline:
                            raise
                    await asyncio.sleep(pause_s)
            finally:
                self._free.release()

    async def _exchange(self, packed: bytes, count: int) -> list[Any]:
        line = self._idle.pop() if self._idle else await self._pool.get_connection()  # type: ignore[no-untyped-call]
        # The time is watched by who calls: a limit of redis-py's own would be a task for each command.
        line.socket_timeout = None
        read_all = False
        try:
            if line.is_connected and (await line.can_read() or self._is_astray(line)):
                await line.disconnect(nowait=True)
            if not line.is_connected:
                # Not left to the sending: it would not ask Sentinel again who the master is.
                await line.connect()
            await line.send_packed_command(packed, check_health=False)
            replies: list[Any] = []
            for _ in range(count):
                try:
                    replies.append(await line.read_response())
                except ResponseError as error:
                    replies.append(error)
            read_all = True
            return replies
        finally:
            if not read_all:
                await line.disconnect(nowait=True)
            self._idle.append(line)

    def _is_astray(self, line: AbstractConnection) -> bool:
        """Whether Sentinel has named another master since: the pool closes what is idle then, and takes these for used."""
        master = getattr(self._pool, "master_address", None)
        return master is not None and (getattr(line, "host", None), getattr(line, "port", None)) != tuple(master)


class ClusterLines:
    """Lines of a Redis Cluster."""

    def __init__(self, client: RedisCluster, concurrency: int) -> None:
        self._client = client
        self._free = asyncio.Semaphore(concurrency)

    async def ask(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        return list(await call(partial(self._ask, commands), timeout_s))

    async def _ask(self, commands: Sequence[Command]) -> list[Any]:
        async with self._free:
            if len(commands) == 1:
                try:
                    return [await self._client.execute_command(*commands[0])]
                except ResponseError as error:
                    return [error]
            attempt = 0
            while True:
                pipeline = self._client.pipeline()
                for command in commands:
                    pipeline.execute_command(*command)
                replies = list(await pipeline.execute(raise_on_error=False))
                # Of a pipeline, redis-py gives a connection that broke back as if it were a reply.
                broken = next((reply for reply in replies if isinstance(reply, BROKEN)), None)
                if broken is None:
                    return replies
                attempt += 1
                if attempt > RETRIES:
                    raise broken
                await asyncio.sleep(_pause_s(attempt))
