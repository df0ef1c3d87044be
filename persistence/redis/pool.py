"""Pools of connections for scripts: commands out, as many replies back, nothing left unread.

What redis-py does around a command (locks, counters, a packer in Python, a task that waits for the socket) takes longer
than the command: 15 to 30 µs (2026-11). So its connections, which know TLS, authentication and Sentinel, are taken from its
pools once and held here, on Redis Cluster by node. What always holds: one call at a time uses a connection, and it is used
again only after that call has read every reply it asked for; otherwise it is closed, and connects anew. Before its first
call a new connection asks its server who it is: only masters are used, and none before `Introduce` has returned.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import nullcontext
from functools import partial
from time import monotonic
from typing import Any, Protocol

import hiredis
import structlog
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection
from redis.crc import key_slot
from redis.exceptions import (
    AskError,
    ClusterDownError,
    MasterDownError,
    MovedError,
    ReadOnlyError,
    RedisClusterException,
    ResponseError,
    TryAgainError,
)
from redis.exceptions import ConnectionError as Disconnected
from redis.exceptions import TimeoutError as TimedOut

from persistence.errors import RedisUnavailable
from persistence.redis.connection import BACKOFF, CONNECT_TIMEOUT_S, REPLY_TIMEOUT_S, RETRIES, Client, call, translated
from persistence.retry import Attempts
from persistence.tasks import retrieve

log = structlog.get_logger()

BROKEN = (Disconnected, TimedOut, ClusterDownError, TryAgainError, RedisClusterException, OSError)
"""Errors that may pass when the call is repeated. asyncio's TimeoutError is an OSError."""

NO_MASTER = (ReadOnlyError, MasterDownError)
"""Errors of a server that has become a replica: its connections lead nowhere any more."""

REDIRECTS = 5
REFRESH_S = 0.5

Argument = str | bytes | int | float
Command = Sequence[Argument]

Execute = Callable[[Sequence[Command]], Awaitable[list[Any]]]
"""Sends commands on one certain connection."""

Introduce = Callable[[str, Execute], Awaitable[None]]
"""Gets to know a server by its replication id, which is another one after each restart and each promotion, on a connection
that leads to it."""

Address = tuple[str, int]

Leave = Callable[[Address], Awaitable[None]]
"""Takes leave of a former master, before the one that Sentinel names instead is used."""


class Pool(Protocol):
    """Sends commands, all to one slot, in one round trip."""

    async def execute(self, commands: Sequence[Command], key: str, timeout_s: float) -> list[Any]:
        """The replies in order, an error reply as a ResponseError among them, from the master that has `key`. Commands may
        be sent more than once, so repeating them has to be safe. Raises RedisUnavailable."""
        ...

    def server_of(self, key: str) -> str:
        """A name of the server that has `key` as far as is known: calls with the same name fail together."""
        ...

    async def check(self, *, anew: bool = False) -> None:
        """Asks every server in use who it is now, and the Sentinels who is master; with `anew` so does every connection
        before its next call. Raises RedisUnavailable, on a cluster when no server answers."""
        ...

    async def switched(self) -> None:
        """Returns when a Sentinel announces another master; never where there are none."""
        ...

    async def drop(self) -> None:
        """Closes every connection, in use or idle: replies still unread on them are never read."""
        ...


async def know_everybody(replid: str, execute: Execute) -> None:
    """Introduces no one."""


async def leave_at_once(address: Address) -> None:
    """Leaves a former master without waiting for anything."""


def make_pool(
    client: Client, *, concurrency: int, introduce: Introduce = know_everybody, leave: Leave = leave_at_once
) -> Pool:
    """A pool on `client` for `concurrency` calls at a time: further calls wait, so redis-py's pools never run out."""
    if isinstance(client, RedisCluster):
        return ClusterPool(client, concurrency, introduce)
    return HeldPool(client, concurrency, introduce, leave)


class Server:
    """The held connections to one address. `take` has redis-py make one, `stale` tells of one that leads elsewhere."""

    def __init__(
        self,
        take: Callable[[], Awaitable[AbstractConnection]],
        introduce: Introduce,
        stale: Callable[[AbstractConnection], bool],
    ) -> None:
        self._take = take
        self._introduce = introduce
        self._stale = stale
        self.idle: list[AbstractConnection] = []
        self.held: list[AbstractConnection] = []
        self._known: set[AbstractConnection] = set()

    async def exchange(self, packed: bytes, count: int) -> list[Any]:
        """Sends packed commands and reads their replies, errors among them."""
        connection = self.idle.pop() if self.idle else await self._new()
        read_all = False
        try:
            if connection.is_connected and (await connection.can_read() or self._stale(connection)):
                await self._close(connection)
            if not connection.is_connected:
                self._known.discard(connection)
                # Not left to the sending, which would not ask Sentinel again for the master.
                await connection.connect()  # type: ignore[no-untyped-call]
            # The caller watches the time: redis-py's own limit would be a task for each command.
            connection.socket_timeout = None
            if connection not in self._known:
                await self._meet(connection)
            replies = await _exchange(connection, packed, count)
            read_all = not any(isinstance(reply, NO_MASTER) for reply in replies)
            if not read_all:
                raise Disconnected("the server is no master any more")
            return replies
        finally:
            if not read_all:
                await self._close(connection)
            self.idle.append(connection)

    async def _new(self) -> AbstractConnection:
        connection = await self._take()
        self.held.append(connection)
        return connection

    async def _meet(self, connection: AbstractConnection) -> None:
        """Asks the server who it is; a replica is not used, and neither is a master that cannot be introduced."""
        (reply,) = await _exchange(connection, pack([("INFO", "replication")]), 1)
        if isinstance(reply, ResponseError):
            facts = {}  # an account without the right to ask, or a server without replication
        elif isinstance(reply, bytes):
            facts = dict(line.split(":", 1) for line in reply.decode(errors="replace").splitlines() if ":" in line)
        else:
            raise Disconnected("the reply belongs to another command")
        if facts.get("role", "master") != "master":
            raise Disconnected("the server is a replica")

        async def execute(commands: Sequence[Command]) -> list[Any]:
            return await _exchange(connection, pack(commands), len(commands))

        await self._introduce(facts.get("master_replid", ""), execute)
        self._known.add(connection)

    async def check(self, *, anew: bool) -> None:
        """Asks the server who it is now."""
        if anew:
            self.doubt()
        elif self.idle:
            self._known.discard(self.idle[-1])
        await self.exchange(pack([("PING",)]), 1)

    def doubt(self) -> None:
        """Has every connection ask who its server is before its next call."""
        self._known.clear()

    async def close_idle(self) -> None:
        """Closes the connections that no call uses."""
        for connection in self.idle:
            await self._close(connection)

    async def _close(self, connection: AbstractConnection) -> None:
        self._known.discard(connection)
        await connection.disconnect(nowait=True)

    async def drop(self) -> None:
        """Closes every connection, in use or idle."""
        for connection in self.held:
            await self._close(connection)


def is_error(reply: Any) -> bool:
    return isinstance(reply, ResponseError)


async def _exchange(connection: AbstractConnection, packed: bytes, count: int) -> list[Any]:
    await connection.send_packed_command(packed, check_health=False)
    replies: list[Any] = []
    for _ in range(count):
        try:
            replies.append(await connection.read_response())
        except ResponseError as error:
            replies.append(error)
    return replies


def pack(commands: Sequence[Command]) -> bytes:
    """Commands as they are sent."""
    return b"".join(
        hiredis.pack_command(tuple(command))  # type: ignore[arg-type]  # its stub allows one argument only
        for command in commands
    )


class _BoundedPool:
    """What both kinds of pools have in common: so many calls of a server at a time, each bounded in time, and repeated."""

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        # By server: calls that wait for one that hangs must not take the places of those of the others.
        self._free: dict[str, asyncio.Semaphore] = {}

    def server_of(self, key: str) -> str:
        return ""

    async def execute(self, commands: Sequence[Command], key: str, timeout_s: float) -> list[Any]:
        deadline_s = monotonic() + timeout_s
        attempts: Attempts | None = None
        name = self.server_of(key)
        free = self._free.get(name)
        if free is None:
            free = self._free[name] = asyncio.Semaphore(self._concurrency)
        with translated():
            # Many calls may wait for a Redis that hangs, none of them longer than its own time.
            async with asyncio.timeout(timeout_s) if free.locked() else nullcontext():
                await free.acquire()
            try:
                while True:
                    left_s = deadline_s - monotonic()
                    if left_s <= 0:
                        raise TimeoutError("no connection was free in time")
                    try:
                        async with asyncio.timeout(min(left_s, REPLY_TIMEOUT_S)):
                            return await self._send(commands, key)
                    except BROKEN as error:
                        attempts = attempts or Attempts(BACKOFF, limit=RETRIES, deadline_s=deadline_s)
                        pause_s = attempts.next_pause_s(error)
                    await asyncio.sleep(pause_s)
            finally:
                free.release()

    async def _send(self, commands: Sequence[Command], key: str) -> list[Any]:
        raise NotImplementedError


class HeldPool(_BoundedPool):
    """Held connections to a single Redis, or to the master that Sentinel names."""

    def __init__(self, client: Redis, concurrency: int, introduce: Introduce, leave: Leave) -> None:
        super().__init__(concurrency)
        self._pool = client.connection_pool
        self._introduce = introduce
        self._leave = leave
        self._master: Address | None = None
        self._leaving: asyncio.Future[None] | None = None
        self._replid = ""
        self.server = Server(self._take, self._meet, self._is_stale)

    async def _meet(self, replid: str, execute: Execute) -> None:
        before, self._replid = self._replid, replid or self._replid
        if before not in ("", self._replid):
            log.warning("redis.server_changed")
            await self._doubt()
        master = self._master_address
        if self._master is not None and self._master != master:
            # A task of its own, which outlasts the call that finds the new master first.
            self._leaving = asyncio.ensure_future(self._leave(self._master))
            self._leaving.add_done_callback(retrieve)
        self._master = master
        if self._leaving is not None:
            await asyncio.wait({self._leaving})
        await self._introduce(replid, execute)

    @property
    def _master_address(self) -> Address | None:
        """The master that Sentinel has named last."""
        address = getattr(self._pool, "master_address", None)
        return None if address is None else (str(address[0]), int(address[1]))

    async def _doubt(self) -> None:
        """Closes the other connections, for the name may have led elsewhere when they were made; those in use for a call ask
        who their server is before the next one. Subscriptions, which are not held here, cannot ask, and are closed too."""
        self.server.doubt()
        await self.server.close_idle()
        others = self._pool._in_use_connections.difference(self.server.held)
        await self._pool.disconnect(inuse_connections=False)
        await asyncio.gather(*(connection.disconnect(nowait=True) for connection in others), return_exceptions=True)

    async def _take(self) -> AbstractConnection:
        connection: AbstractConnection = await self._pool.get_connection()  # type: ignore[no-untyped-call]
        return connection

    async def _send(self, commands: Sequence[Command], key: str) -> list[Any]:
        replies = await self.server.exchange(pack(commands), len(commands))
        if self._master is not None and any(str(reply).startswith("NOREPLICAS") for reply in replies if is_error(reply)):
            # A master that has lost its replicas may be none any more.
            await self.check()
            if self._master_address != self._master:
                raise Disconnected("another server is the master now")
        return replies

    def _is_stale(self, connection: AbstractConnection) -> bool:
        """Whether Sentinel has named another master since. redis-py's pool closes only its idle connections then, and these
        are in use for it."""
        master = self._master_address
        return master is not None and (getattr(connection, "host", None), getattr(connection, "port", None)) != master

    async def check(self, *, anew: bool = False) -> None:
        before = self._master_address
        if before is not None:
            await call(self._pool.get_master_address, CONNECT_TIMEOUT_S * 2)  # type: ignore[attr-defined]
            if self._master_address != before:
                log.warning("redis.master_changed", master=self._master_address)
                # Subscriptions too, which the old master would go on to serve.
                await self._pool.disconnect(inuse_connections=True)
        with translated():
            async with asyncio.timeout(REPLY_TIMEOUT_S):
                await self.server.check(anew=anew)

    async def switched(self) -> None:
        sentinels = getattr(self._pool, "sentinel_manager", None)
        if sentinels is None:
            await asyncio.Event().wait()
        else:
            await sentinels.switched()

    async def drop(self) -> None:
        await self.server.drop()
        await self._pool.disconnect(inuse_connections=True)


class ClusterPool(_BoundedPool):
    """Held connections to the masters of a Redis Cluster. Which of them has a slot redis-py's client knows."""

    def __init__(self, client: RedisCluster, concurrency: int, introduce: Introduce) -> None:
        super().__init__(concurrency)
        self._client = client
        self._introduce = introduce
        self._servers: dict[str, tuple[ClusterNode, Server]] = {}
        self._refreshed_at = 0.0

    def server_of(self, key: str) -> str:
        nodes = self._client.nodes_manager.slots_cache.get(key_slot(key.encode()))
        return nodes[0].name if nodes else ""

    async def _send(self, commands: Sequence[Command], key: str) -> list[Any]:
        packed, count, slot = pack(commands), len(commands), key_slot(key.encode())
        if not self._client.nodes_manager.slots_cache:
            await self._client.initialize()
        server = self._server_of(slot)
        asking = False
        for _ in range(REDIRECTS):
            try:
                replies = await (self._ask(server, commands) if asking else server.exchange(packed, count))
            except (Disconnected, OSError):
                # Another node may have taken over, which this one cannot tell any more.
                await self._refresh()
                raise
            asking = False
            moved = next((reply for reply in replies if isinstance(reply, ResponseError)), None)
            if isinstance(moved, MovedError):
                await self._client.nodes_manager.move_slot(moved)
                server = self._server_of(slot)
            elif isinstance(moved, AskError):
                asking, server = True, self._server_at(moved.host, moved.port)
            elif isinstance(moved, (TryAgainError, ClusterDownError)):
                if isinstance(moved, ClusterDownError):
                    await self._refresh()
                raise moved
            else:
                return replies
        raise Disconnected("the slot moves on and on")

    @staticmethod
    async def _ask(server: Server, commands: Sequence[Command]) -> list[Any]:
        """Commands to the node that a slot moves to, while it still is another's."""
        asked = [part for command in commands for part in (("ASKING",), command)]
        return (await server.exchange(pack(asked), len(asked)))[1::2]

    def _server_of(self, slot: int) -> Server:
        nodes = self._client.nodes_manager.slots_cache.get(slot)
        if not nodes:
            raise Disconnected("no node has the slot")
        return self._held(nodes[0])

    def _server_at(self, host: str, port: int) -> Server:
        node = self._client.get_node(host, port)
        if node is None:
            raise Disconnected("the slot moves to a node that is not known yet")
        return self._held(node)

    def _held(self, node: ClusterNode) -> Server:
        known = self._servers.get(node.name)
        if known is not None and known[0] is node:
            return known[1]

        async def take() -> AbstractConnection:
            return node.acquire_connection()

        def is_stale(connection: AbstractConnection) -> bool:
            return bool(connection.should_reconnect())  # type: ignore[no-untyped-call]

        server = Server(take, self._introduce, is_stale)
        self._servers[node.name] = node, server
        return server

    async def _refresh(self) -> None:
        """Asks the nodes who has which slot, and lets go of those that are no masters now. It closes every connection, so it
        is done once in REFRESH_S at most."""
        if monotonic() - self._refreshed_at < REFRESH_S:
            return
        self._refreshed_at = monotonic()
        await self._client.nodes_manager.initialize()
        masters = {node.name for node in self._client.get_primaries()}
        for name in self._servers.keys() - masters:
            _, server = self._servers.pop(name)
            await server.drop()

    async def check(self, *, anew: bool = False) -> None:
        # The map of slots is not asked for: that closes every connection. Who has lost a slot says so.
        servers = [server for _, server in self._servers.values()]
        checks = (call(partial(server.check, anew=anew), REPLY_TIMEOUT_S) for server in servers)
        outcomes = await asyncio.gather(*checks, return_exceptions=True)
        failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for failure in failures:
            # One server that is away is no reason to know nothing of the others.
            if len(failures) == len(servers) or not isinstance(failure, RedisUnavailable):
                raise failure

    async def switched(self) -> None:
        await asyncio.Event().wait()

    async def drop(self) -> None:
        for _, server in self._servers.values():
            await server.drop()
        await asyncio.gather(*(node.disconnect() for node in self._client.get_nodes()), return_exceptions=True)
