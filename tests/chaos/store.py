"""Redis of a run as one store, whether it is a single server, a master that Sentinels watch, or a cluster.

With Sentinel and Cluster the servers know each other by users of their own, `peer` (replicas) and `watch` (Sentinels),
and everybody else needs a password: so a fault can cut a master off from its replicas, or from all other servers, while
pods and workers still reach it (`faults_failover.py`).
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.crc import key_slot
from redis.exceptions import RedisClusterException, RedisError, ResponseError

from gateway.dev.servers import redis as servers
from gateway.dev.servers.ports import HOST, ServerError, free_port
from gateway.dev.servers.redis import CLUSTER_SLOTS, RedisServer, SentinelServer
from persistence.redis.keys import GROUP, Keys
from persistence.redis.urls import CLUSTER_PARTITIONS
from tests.chaos.options import Options
from tests.chaos.server import ChaosServer
from tests.support.serving import wait_for

PASSWORD = "chaos"
PEER, WATCH = "peer", "watch"
BETWEEN_SERVERS = {
    "requirepass": PASSWORD,
    "user": "\n".join(f"{name} on >{PASSWORD} ~* &* +@all" for name in (PEER, WATCH)),
    "masteruser": PEER,
    "masterauth": PASSWORD,
}
STALL_MS = "250"
"""From which time on Redis notes what held it up, in milliseconds."""
MAX_LAG_S = "1"
"""min-replicas-max-lag: a replica that has not been heard of for longer is not in step."""
ASKED_EVERY_S = 0.2
MAX_CONNECTIONS = 1024
"""Of the harness to a node: it asks about all partitions at once."""
WHOLE_S = 60.0
"""How long servers may take to work together again when all of them run."""

AWAY = (RedisError, RedisClusterException, OSError)
"""What clients raise when Redis, or a part of it, is away: redis-py's error when no node of a cluster can be reached is none
of its RedisErrors."""

Client = Redis | RedisCluster


class Store:
    """The servers, and clients of them. `servers` hold data; `sentinels` are none but on Sentinel."""

    def __init__(self, options: Options, directory: Path) -> None:
        self.topology = options.topology
        self.keys = Keys("gw", CLUSTER_PARTITIONS if self.topology == "cluster" else 1)
        self.sentinels: tuple[SentinelServer, ...] = ()
        self._clients: dict[int, Redis] = {}
        self._cluster: RedisCluster | None = None
        self._tasks: list[asyncio.Task[None]] = []
        config = {
            "appendfsync": options.appendfsync,
            "maxmemory-policy": options.eviction,
            "latency-monitor-threshold": STALL_MS,
        }
        if options.min_replicas:
            config |= {"min-replicas-to-write": "1", "min-replicas-max-lag": MAX_LAG_S}
        if self.topology == "single":
            own_clock = not options.faults or "clock-set-back" in options.faults
            server = ChaosServer(directory / "redis", free_port(), own_clock=own_clock, config=config)
            self.servers: tuple[RedisServer, ...] = (server,)
            self.group: RedisServer | servers.RedisSentinel | servers.RedisCluster = server
        elif self.topology == "sentinel":
            sentinel = servers.RedisSentinel(
                directory / "sentinel",
                master_port=free_port(),
                replica_port=free_port(),
                sentinel_port=free_port(),
                more_replica_ports=[free_port()],
                more_sentinel_ports=[free_port(), free_port()],
                config=config | BETWEEN_SERVERS | {"repl-ping-replica-period": "1"},
                sentinel_config={"auth-user": WATCH, "auth-pass": PASSWORD},
            )
            self.servers, self.sentinels = (sentinel.master, *sentinel.replicas), sentinel.sentinels
            self.group = sentinel
        else:
            cluster = servers.RedisCluster(
                directory / "cluster",
                [free_port() for _ in range(3)],
                replica_ports=[free_port() for _ in range(3)],
                config=config | BETWEEN_SERVERS | {"cluster-require-full-coverage": "no"},
            )
            self.servers, self.group = cluster.servers, cluster
        self._master_port = self.servers[0].port

    @property
    def url(self) -> str:
        return self.group.url

    async def __aenter__(self) -> Self:
        await asyncio.to_thread(self.group.start)
        if self.topology == "cluster":
            nodes = [ClusterNode(HOST, server.port) for server in self.servers]
            self._cluster = RedisCluster(
                startup_nodes=nodes,
                password=PASSWORD,
                require_full_coverage=False,
                protocol=2,
                retry=Retry(NoBackoff(), 1),
                socket_timeout=5,
                health_check_interval=0,
                max_connections=MAX_CONNECTIONS,
            )
            await self._cluster.initialize()
        elif self.topology == "sentinel":
            self._tasks.append(asyncio.create_task(self._follow()))
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for task in self._tasks:
            task.cancel()
        for client in self._clients.values():
            await client.aclose()
        if self._cluster is not None:
            await self._cluster.aclose()
        await asyncio.to_thread(self.group.stop)

    @property
    def client(self) -> Client:
        """A client for whoever owns a key now: of the cluster, or of the server that is master."""
        return self._cluster if self._cluster is not None else self.client_of(self.master)

    def client_of(self, server: RedisServer) -> Redis:
        """A client for one server."""
        if server.port not in self._clients:
            self._clients[server.port] = Redis(
                port=server.port,
                password=server.password or None,
                protocol=2,
                retry=Retry(NoBackoff(), 0),
                socket_timeout=5,
                health_check_interval=0,
            )
        return self._clients[server.port]

    async def ask(self, server: RedisServer, *command: str | int) -> Any:
        """The reply of one server to a command."""
        client: Any = self.client_of(server)
        return await client.execute_command(*command)

    @property
    def master(self) -> RedisServer:
        """The master of a single server or of Sentinel: the one that most Sentinels name."""
        return next(server for server in self.servers if server.port == self._master_port)

    async def masters(self) -> list[RedisServer]:
        """Every server that owns data now."""
        if self.topology != "cluster":
            return [self.master]
        owners = set((await self.owners()).values())
        return [server for server in self.servers if server.port in owners]

    async def owners(self, without: RedisServer | None = None) -> dict[int, int]:
        """The port of the server that owns a partition, by partition, as a server of the cluster sees it that answers;
        `without` is not asked."""
        if self.topology != "cluster":
            return {0: self._master_port}
        slots: dict[int, int] = {}
        for server in (server for server in self.servers if server is not without):
            with suppress(ServerError):
                found: Any = await asyncio.to_thread(server.ask, "CLUSTER", "SLOTS")
                for first, last, (_, port, *_), *_ in found:
                    slots |= dict.fromkeys(range(first, last + 1), port)
                break
        tagged = {partition: key_slot(self.keys.outbox(partition).encode()) for partition in range(self.keys.partitions)}
        return {partition: slots[slot] for partition, slot in tagged.items() if slot in slots}

    async def replicas_of(self, master: RedisServer) -> list[RedisServer]:
        """The servers that follow this one."""
        found = await asyncio.gather(*(asyncio.to_thread(one.facts, "INFO", "replication") for one in self.servers))
        pairs = zip(self.servers, found, strict=True)
        return [one for one, facts in pairs if facts.get("master_port") == str(master.port)]

    def covers(self, partitions: set[int]) -> Callable[[str], bool]:
        """Whether a session is in one of these partitions."""
        return lambda session_id: self.keys.partition(session_id) in partitions

    async def whole(self) -> bool:
        """Whether every server runs, and all work together: nobody who has been a master takes itself for one still."""
        if self.topology == "single":
            return True
        together = await asyncio.to_thread(self._work_together)
        # The client learns of a new master when it meets the old one only; whoever looks next should not be refused.
        if together and self._cluster is not None:
            with suppress(*AWAY):
                await self._cluster.nodes_manager.initialize()
        return together

    def _work_together(self) -> bool:
        if not all(server.running for server in (*self.servers, *self.sentinels)):
            return False
        if isinstance(self.group, servers.RedisCluster):
            return self.group.is_whole()
        facts = [server.facts("INFO", "replication") for server in self.servers]
        masters = [server.port for server, one in zip(self.servers, facts, strict=True) if one.get("role") == "master"]
        return (
            masters == [self._master_port]
            and all(one.get("role") == "master" or one.get("master_link_status") == "up" for one in facts)
            and all(one.get("master_port", str(masters[0])) == str(masters[0]) for one in facts)
            and all(self._names(sentinel) == masters[0] for sentinel in self.sentinels)
            and all(sentinel.sees(len(self.servers) - 1, len(self.sentinels) - 1) for sentinel in self.sentinels)
        )

    def _names(self, sentinel: SentinelServer) -> int | None:
        try:
            return sentinel.master_port()
        except ServerError:
            return None

    def named(self) -> list[int]:
        """The ports that Sentinels name as that of the master, of those that answer."""
        return [port for port in map(self._names, self.sentinels) if port is not None]

    async def _follow(self) -> None:
        """Notes who the master is, as more than half of all Sentinels say."""
        while True:
            named = await asyncio.to_thread(self.named)
            for port in set(named):
                if 2 * named.count(port) > len(self.sentinels):
                    self._master_port = port
            await asyncio.sleep(ASKED_EVERY_S)

    @property
    def clock_s(self) -> float:
        """How much the clock of Redis is before that of the machine."""
        server = self.servers[0]
        return server.clock_s if isinstance(server, ChaosServer) else 0

    # ----------------------------------------------------------------------------------------------- all partitions at once

    async def partitions(self) -> list[int]:
        """The partitions that have an outbox."""
        names = {self.keys.outbox(partition): partition for partition in range(self.keys.partitions)}
        found = await self.each(("EXISTS", name) for name in names)
        return [partition for partition, there in zip(names.values(), found, strict=True) if there]

    async def each(self, commands: Iterable[tuple[str | int, ...]]) -> list[Any]:
        """The replies to commands about a key each, whatever server has it. Errors are raised."""
        pipe: Any = self.client.pipeline() if self._cluster is not None else self.client.pipeline(transaction=False)
        for command in commands:
            pipe.execute_command(*command)
        replies: list[Any] = await pipe.execute()
        return replies

    async def of_outboxes(self, ask: Callable[[str], Awaitable[Any]]) -> list[Any]:
        """The replies about all outboxes, without those that are gone, or whose group is."""
        asked = [of_group(ask(self.keys.outbox(partition))) for partition in await self.partitions()]
        return [reply for reply in await asyncio.gather(*asked) if reply is not None]

    async def waiting(self) -> tuple[int, int]:
        """Records on the outboxes, and those of them that a worker has taken and not acknowledged."""
        outboxes = [self.keys.outbox(partition) for partition in range(self.keys.partitions)]
        records = sum(await self.each(("XLEN", outbox) for outbox in outboxes))
        # Without its group nothing is pending; the stores tell what was lost.
        pending = await self.of_outboxes(lambda outbox: self.client.xpending(outbox, GROUP))
        return records, sum(int(one["pending"]) for one in pending)

    async def running(self) -> int:
        """Turns that hold their sessions."""
        return sum(await self.each(("ZCARD", self.keys.running(partition)) for partition in range(self.keys.partitions)))

    async def last_taken(self) -> list[str] | None:
        """The ids of the records that workers have taken last; None while Redis or an outbox's group is away."""
        try:
            groups = await self.of_outboxes(self.client.xinfo_groups)
        except AWAY:
            return None
        return [str(one["last-delivered-id"]) for found in groups for one in found if one["name"] == GROUP.encode()] or None

    async def everywhere(self, *command: str | int) -> list[Any]:
        """The replies of all masters to a command."""
        return [await self.ask(server, *command) for server in await self.masters()]

    async def become_whole(self) -> None:
        """Waits until all servers work together."""
        await wait_for(self.whole, "all servers of Redis work together", WHOLE_S)


def slots_with(keys: Keys, partitions: set[int]) -> list[int]:
    """The slots of partitions, and as many that are empty, in order."""
    tagged = {key_slot(keys.outbox(partition).encode()) for partition in partitions}
    beside = {(slot + 1) % CLUSTER_SLOTS for slot in tagged}
    return sorted(tagged | beside)


async def of_group(reply: Awaitable[Any]) -> Any:
    """A reply about an outbox's group; None when the outbox, or its group, is gone: a Redis that may evict anything takes
    the outbox too."""
    try:
        return await reply
    except ResponseError as error:
        if not str(error).startswith("NOGROUP") and "no such key" not in str(error):
            raise
        return None
