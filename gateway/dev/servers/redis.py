"""Redis, alone, with Sentinel or as a cluster, as child processes."""

import json
import os
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self, TypeAlias

from gateway.dev.servers.ports import HOST, ServerError, bus_port
from gateway.dev.servers.process import NOTHING, START_LIMIT_S, Server, wait_until
from gateway.dev.servers.programs import find_redis_server

SENTINEL_NAME = "gateway"

CLUSTER_SLOTS = 16384


class RedisServer(Server):
    """A Redis or Valkey server that keeps its data: append-only file synced every second, `volatile-lru`, sessions packed.

    `config` takes configuration directives by name; they override the defaults here. The configuration file is written
    at the first start of this object; a restart keeps what Sentinel or CONFIG REWRITE made of it.
    """

    kind = "redis"

    def __init__(self, directory: Path, port: int, *, config: Mapping[str, str] = NOTHING) -> None:
        super().__init__(directory, port)
        self._config = dict(config)
        self._configured = False

    @property
    def url(self) -> str:
        return f"redis://{HOST}:{self.port}/0"

    def pause(self) -> None:
        """Freeze the process (SIGSTOP): connections stay open and nothing answers, as in a long stall."""
        os.kill(self.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let a paused process go on (SIGCONT)."""
        os.kill(self.pid, signal.SIGCONT)

    @property
    def _mark(self) -> Path:
        return self.directory / "redis.conf"

    @property
    def _pid_file(self) -> Path:
        return self.directory / "redis.pid"

    def _command(self) -> list[str]:
        return [str(find_redis_server()), str(self._mark)]

    def _directives(self) -> list[str]:
        config = {
            "appendonly": "yes",
            "appendfsync": "everysec",
            "save": "",
            "maxmemory-policy": "volatile-lru",
            # A session as one block and not as a hundred: less than half of the memory, and of what is cold in caches.
            "hash-max-listpack-entries": "128",
            "hash-max-listpack-value": "2048",
            **self._config,
        }
        return [f"{name} {value or _quoted('')}" for name, value in config.items()]

    def _prepare(self) -> None:
        if self._configured:
            return
        lines = [
            f"port {self.port}",
            f"bind {HOST}",
            f"dir {_quoted(str(self.directory))}",
            f"pidfile {_quoted(str(self._pid_file))}",
            "daemonize no",
            'logfile ""',
            "set-proc-title no",  # the command line has to keep the path that proves whose it is
            *self._directives(),
        ]
        self._mark.write_text("\n".join(lines) + "\n")
        self._configured = True

    def _answers(self) -> bool:
        try:
            if _ask(self.port, "PING") != "PONG":
                return False
        except ServerError as error:
            return "NOAUTH" in str(error)  # it serves those who know its password
        return self._process is not None and _facts(self.port, "INFO", "server").get("process_id") == str(self._process.pid)


class SentinelServer(RedisServer):
    """A Redis Sentinel, the same program in another role: watches one master by the name `gateway`, with quorum 1."""

    kind = "sentinel"

    def __init__(self, directory: Path, port: int, *, master_port: int) -> None:
        super().__init__(directory, port)
        self._master_port = master_port

    @property
    def url(self) -> str:
        return f"redis+sentinel://{HOST}:{self.port}/{SENTINEL_NAME}/0"

    def _command(self) -> list[str]:
        return [*super()._command(), "--sentinel"]

    def _directives(self) -> list[str]:
        return [
            f"sentinel monitor {SENTINEL_NAME} {HOST} {self._master_port} 1",
            f"sentinel down-after-milliseconds {SENTINEL_NAME} 1000",
            f"sentinel failover-timeout {SENTINEL_NAME} 3000",
        ]


class _Group(ABC):
    """Redis processes that are one store together; started in order, stopped in the opposite order."""

    servers: tuple[RedisServer, ...]

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect."""

    @abstractmethod
    def _start_in_order(self) -> None:
        """Start the servers and return when they work together."""

    def start(self) -> None:
        """Start all and return when they work together. Raises ServerError, with none left, when they do not."""
        try:
            self._start_in_order()
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop all that run."""
        for server in reversed(self.servers):
            server.stop()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


class RedisCluster(_Group):
    """A Redis Cluster of masters only, the slots shared out evenly: one for each of `ports`."""

    def __init__(self, directory: Path, ports: Sequence[int], *, config: Mapping[str, str] = NOTHING) -> None:
        if len(ports) < 3:
            raise ServerError(f"a Redis Cluster needs at least 3 masters, not {len(ports)}")
        # One directory for each port: the nodes remember each other's ports, so others make another cluster.
        self.servers = tuple(
            RedisServer(
                directory / f"node-{port}",
                port,
                config={
                    "cluster-enabled": "yes",
                    "cluster-config-file": "nodes.conf",
                    "cluster-node-timeout": "2000",
                    "cluster-port": str(bus_port(port)),
                    **config,
                },
            )
            for port in ports
        )

    @property
    def url(self) -> str:
        return f"redis+cluster://{HOST}:{self.servers[0].port}"

    def _start_in_order(self) -> None:
        for server in self.servers:
            server.start()
        if _facts(self.servers[0].port, "CLUSTER", "INFO").get("cluster_slots_assigned") == "0":
            self._join()
        if not wait_until(lambda: all(map(self._is_whole, self.servers)), START_LIMIT_S):
            raise ServerError(f"the Redis Cluster at port {self.servers[0].port} did not come together; see its logs")

    def _join(self) -> None:
        for number, server in enumerate(self.servers):
            first, end = (CLUSTER_SLOTS * n // len(self.servers) for n in (number, number + 1))
            _ask(server.port, "CLUSTER", "ADDSLOTSRANGE", str(first), str(end - 1))
            _ask(server.port, "CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))  # spares them settling who is who
        for server in self.servers[1:]:
            _ask(self.servers[0].port, "CLUSTER", "MEET", HOST, str(server.port), str(bus_port(server.port)))

    def _is_whole(self, server: RedisServer) -> bool:
        facts = _facts(server.port, "CLUSTER", "INFO")
        return facts.get("cluster_state") == "ok" and facts.get("cluster_known_nodes") == str(len(self.servers))


class RedisSentinel(_Group):
    """A master, its replica and one Sentinel that fails over between them; the two change roles when it does."""

    def __init__(
        self,
        directory: Path,
        *,
        master_port: int,
        replica_port: int,
        sentinel_port: int,
        config: Mapping[str, str] = NOTHING,
    ) -> None:
        # By default a replica waits 5 s for others to copy along with it.
        config = {"repl-diskless-sync-delay": "0", **config}
        self.master = RedisServer(directory / "master", master_port, config=config)
        self.replica = RedisServer(
            directory / "replica", replica_port, config={**config, "replicaof": f"{HOST} {master_port}"}
        )
        self.sentinel = SentinelServer(directory / "sentinel", sentinel_port, master_port=master_port)
        self.servers = (self.master, self.replica, self.sentinel)

    @property
    def url(self) -> str:
        return self.sentinel.url

    def _start_in_order(self) -> None:
        self.master.start()
        self.replica.start()
        # Sentinel asks a master for its replicas every 10 s only: the replica has to be there when it asks first.
        if not wait_until(self._replica_follows, START_LIMIT_S):
            raise ServerError(f"the replica on port {self.replica.port} does not follow its master; see {self.replica.log}")
        self.sentinel.start()
        if not wait_until(self._sentinel_knows_both, START_LIMIT_S):
            raise ServerError(f"the Sentinel does not see master and replica; see {self.sentinel.log}")

    def _replica_follows(self) -> bool:
        facts = _facts(self.replica.port, "INFO", "replication")
        return facts.get("role") == "master" or facts.get("master_link_status") == "up"  # a failover made it master

    def _sentinel_knows_both(self) -> bool:
        replicas = _ask(self.sentinel.port, "SENTINEL", "REPLICAS", SENTINEL_NAME)
        return isinstance(replicas, list) and any(_fields(replica).get("master-link-status") == "ok" for replica in replicas)


def _quoted(value: str) -> str:
    """A value as the configuration file of Redis wants it when it is empty or has blanks in it."""
    return json.dumps(value, ensure_ascii=False)


# The little of the Redis protocol that waiting and joining take
# (https://redis.io/docs/latest/develop/reference/protocol-spec/).
# A client library would retry and pool behind our back, where the point is to see what one server says right now.

Reply: TypeAlias = "str | int | list[Reply] | None"


def _ask(port: int, *words: str) -> Reply:
    """One command, one reply. An error reply, and no reply at all, raise ServerError."""
    try:
        with socket.create_connection((HOST, port), timeout=2) as link, link.makefile("rb") as stream:
            link.sendall(" ".join(words).encode() + b"\r\n")
            return _read_reply(stream)
    except OSError as error:
        raise ServerError(f"no answer on port {port} to {' '.join(words)}: {error}") from error


def _read_reply(stream: IO[bytes]) -> Reply:
    line = stream.readline()
    kind, rest = line[:1], line[1:].decode().rstrip()
    match kind:
        case b"+":
            return rest
        case b":":
            return int(rest)
        case b"$":
            return stream.read(int(rest) + 2)[:-2].decode() if int(rest) >= 0 else None
        case b"*":
            return [_read_reply(stream) for _ in range(int(rest))]
        case b"-":
            raise ServerError(rest)
    raise ConnectionError("the connection ended" if not line else f"not the protocol of Redis: {line[:40]!r}")


def _facts(port: int, *words: str) -> dict[str, str]:
    """The `name:value` lines of an INFO command; empty when the server does not answer."""
    try:
        text = _ask(port, *words)
    except ServerError:
        return {}
    pairs = (line.partition(":") for line in str(text).splitlines() if not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def _fields(reply: Reply) -> dict[str, str]:
    """What Sentinel says about one server: names and values in turn."""
    words = [str(word) for word in reply] if isinstance(reply, list) else []
    return dict(zip(words[::2], words[1::2], strict=True))
