"""Pools of connections for scripts: commands out, as many replies back, nothing left unread.

What redis-py does around a command (locks, counters, a packer in Python, a task that waits for the socket) takes longer
than the command: 15 to 30 µs (2026-11). So its connections, which know TLS, authentication and Sentinel, are taken from its
pool once and held here. What always holds: one call at a time uses a connection, and it is used again only after that call
has read every reply it asked for; otherwise it is closed, and connects anew. On Redis Cluster redis-py's client does all of
this, for it knows the slots.
"""

import asyncio
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from time import monotonic
from typing import Any, Protocol

import hiredis
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ClusterDownError, ResponseError
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import TimeoutError as TimedOut

from persistence.redis.connection import BACKOFF, REPLY_TIMEOUT_S, RETRIES, Client, call, translated
from persistence.retry import Attempts

BROKEN = (Disconnected, TimedOut, ClusterDownError, OSError)
"""Errors that may pass when the call is repeated. asyncio's TimeoutError is an OSError."""

Argument = str | bytes | int | float
Command = Sequence[Argument]


class Pool(Protocol):
    """Sends commands, all to one slot, in one round trip."""

    async def execute(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        """The replies in order, an error reply as a ResponseError among them. Commands may be sent more than once, so
        repeating them has to be safe. Raises RedisUnavailable."""
        ...


def make_pool(client: Client, *, concurrency: int) -> Pool:
    """A pool on `client` for `concurrency` calls at a time: further calls wait, so redis-py's pool never runs out."""
    return ClusterPool(client, concurrency) if isinstance(client, RedisCluster) else HeldPool(client, concurrency)


class HeldPool:
    """Held connections to a single Redis, or to the master that Sentinel names."""

    def __init__(self, client: Redis, concurrency: int) -> None:
        self._pool = client.connection_pool
        self._free = asyncio.Semaphore(concurrency)
        self._idle: list[AbstractConnection] = []

    async def execute(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        packed = b"".join(
            hiredis.pack_command(tuple(command))  # type: ignore[arg-type]  # its stub allows one argument only
            for command in commands
        )
        deadline_s = monotonic() + timeout_s
        attempts: Attempts | None = None
        with translated():
            # Many calls may wait for a Redis that hangs, none of them longer than its own time.
            async with asyncio.timeout(timeout_s) if self._free.locked() else nullcontext():
                await self._free.acquire()
            try:
                while True:
                    left_s = deadline_s - monotonic()
                    if left_s <= 0:
                        raise TimeoutError("no connection was free in time")
                    try:
                        async with asyncio.timeout(min(left_s, REPLY_TIMEOUT_S)):
                            return await self._exchange(packed, len(commands))
                    except BROKEN as error:
                        attempts = attempts or Attempts(BACKOFF, limit=RETRIES, deadline_s=deadline_s)
                        pause_s = attempts.next_pause_s(error)
                    await asyncio.sleep(pause_s)
            finally:
                self._free.release()

    async def _exchange(self, packed: bytes, count: int) -> list[Any]:
        connection = self._idle.pop() if self._idle else await self._pool.get_connection()  # type: ignore[no-untyped-call]
        # The caller watches the time: redis-py's own limit would be a task for each command.
        connection.socket_timeout = None
        read_all = False
        try:
            if connection.is_connected and (await connection.can_read() or self._is_stale(connection)):
                await connection.disconnect(nowait=True)
            if not connection.is_connected:
                # Not left to the sending, which would not ask Sentinel again for the master.
                await connection.connect()
            await connection.send_packed_command(packed, check_health=False)
            replies: list[Any] = []
            for _ in range(count):
                try:
                    replies.append(await connection.read_response())
                except ResponseError as error:
                    replies.append(error)
            read_all = True
            return replies
        finally:
            if not read_all:
                await connection.disconnect(nowait=True)
            self._idle.append(connection)

    def _is_stale(self, connection: AbstractConnection) -> bool:
        """Whether Sentinel has named another master since. redis-py's pool closes only its idle connections then, and these
        are in use for it."""
        master = getattr(self._pool, "master_address", None)
        return master is not None and (getattr(connection, "host", None), getattr(connection, "port", None)) != tuple(master)


class ClusterPool:
    """redis-py's client of a Redis Cluster."""

    def __init__(self, client: RedisCluster, concurrency: int) -> None:
        self._client = client
        self._free = asyncio.Semaphore(concurrency)

    async def execute(self, commands: Sequence[Command], timeout_s: float) -> list[Any]:
        return list(await call(partial(self._execute, commands), timeout_s))

    async def _execute(self, commands: Sequence[Command]) -> list[Any]:
        async with self._free:
            if len(commands) == 1:
                try:
                    return [await self._client.execute_command(*commands[0])]
                except ResponseError as error:
                    return [error]
            return await self._execute_pipeline(commands)

    async def _execute_pipeline(self, commands: Sequence[Command]) -> list[Any]:
        attempts: Attempts | None = None
        while True:
            pipeline = self._client.pipeline()
            for command in commands:
                pipeline.execute_command(*command)
            replies = list(await pipeline.execute(raise_on_error=False))
            # redis-py returns a broken connection among a pipeline's replies, and does not repeat the pipeline.
            broken = next((reply for reply in replies if isinstance(reply, BROKEN)), None)
            if broken is None:
                return replies
            attempts = attempts or Attempts(BACKOFF, limit=RETRIES)
            await attempts.pause(broken)
