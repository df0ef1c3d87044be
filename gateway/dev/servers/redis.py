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

Reply: TypeAlias = "str | int | list[Reply] | None"


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

    @property
    def password(self) -> str:
        """What clients have to know; empty when anybody may come."""
        return self._config.get("requirepass", "")

    def ask(self, *words: str) -> Reply:
        """One command, on a connection of its own. Raises ServerError when it is refused or not answered."""
        return _ask(self.port, *words, password=self.password)

    def facts(self, *words: str) -> dict[str, str]:
        """The `name:value` lines that a command replies with; empty when the server does not answer."""
        try:
            text = self.ask(*words)
        except ServerError:
            return {}
        pairs = (line.partition(":") for line in str(text).splitlines() if not line.startswith("#"))
        return {name: value for name, _, value in pairs}

    def follows(self) -> bool:
        """Whether the server is a master, or a replica that is in touch with its own."""
        facts = self.facts("INFO", "replication")
        return facts.get("role") == "master" or facts.get("master_link_status") == "up"

    def _answers(self) -> bool:
        return self._process is not None and self.facts("INFO", "server").get("process_id") == str(self._process.pid)


class SentinelServer(RedisServer):
    """A Redis Sentinel, the same program in another role: watches one master by the name `gateway`.

    `quorum` Sentinels have to find that the master is down. `config` takes directives about that master (`auth-pass`).
    """

    kind = "sentinel"

    def __init__(
        self, directory: Path, port: int, *, master_port: int, quorum: int = 1, config: Mapping[str, str] = NOTHING
    ) -> None:
        super().__init__(directory, port)
        self._master_port = master_port
        self._quorum = quorum
        self._watch = {"down-after-milliseconds": "1000", "failover-timeout": "3000", **config}

    @property
    def url(self) -> str:
        return f"redis+sentinel://{HOST}:{self.port}/{SENTINEL_NAME}/0"

    def master_port(self) -> int:
        """The port of the master that this Sentinel tells clients. Raises ServerError when it does not answer."""
        match self.ask("SENTINEL", "GET-MASTER-ADDR-BY-NAME", SENTINEL_NAME):
            case [_, str(port)]:
                return int(port)
        raise ServerError(f"the Sentinel on port {self.port} knows no master {SENTINEL_NAME}")

    def sees(self, replicas: int, sentinels: int) -> bool:
        """Whether it is in touch with so many replicas, and with so many Sentinels besides itself."""
        try:
            found = self.ask("SENTINEL", "REPLICAS", SENTINEL_NAME)
            others = self.ask("SENTINEL", "SENTINELS", SENTINEL_NAME)
        except ServerError:
            return False
        if not isinstance(found, list) or not isinstance(others, list):
            return False
        healthy = [replica for replica in found if _fields(replica).get("master-link-status") == "ok"]
        # They keep `master_down`, an opinion of the past, among their flags.
        known = [other for other in others if "s_down" not in _fields(other).get("flags", "s_down").split(",")]
        return len(healthy) >= replicas and len(known) >= sentinels

    def _command(self) -> list[str]:
        return [*super()._command(), "--sentinel"]

    def _directives(self) -> list[str]:
        return [
            f"sentinel monitor {SENTINEL_NAME} {HOST} {self._master_port} {self._quorum}",
            *(f"sentinel {name} {SENTINEL_NAME} {value}" for name, value in self._watch.items()),
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
    """A Redis Cluster, the slots shared out evenly: one master for each of `ports`, one replica for each of `replica_ports`.

    The first replica follows the first master, the second one the second, and so on, round and round.
    """

    def __init__(
        self,
        directory: Path,
        ports: Sequence[int],
        *,
        replica_ports: Sequence[int] = (),
        config: Mapping[str, str] = NOTHING,
    ) -> None:
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
                    # By default a replica waits 5 s for others to copy along with it.
                    "repl-diskless-sync-delay": "0",
                    **config,
                },
            )
            for port in (*ports, *replica_ports)
        )
        self._masters = len(ports)

    @property
    def url(self) -> str:
        password = self.servers[0].password
        return f"redis+cluster://{f':{password}@' if password else ''}{HOST}:{self.servers[0].port}"

    def _start_in_order(self) -> None:
        for server in self.servers:
            server.start()
        if self.servers[0].facts("CLUSTER", "INFO").get("cluster_slots_assigned") == "0":
            self._join()
        if not wait_until(lambda: all(map(self._is_whole, self.servers)), START_LIMIT_S):
            raise ServerError(f"the Redis Cluster at port {self.servers[0].port} did not come together; see its logs")

    def _join(self) -> None:
        masters, replicas = self.servers[: self._masters], self.servers[self._masters :]
        for number, server in enumerate(masters):
            first, end = (CLUSTER_SLOTS * n // len(masters) for n in (number, number + 1))
            server.ask("CLUSTER", "ADDSLOTSRANGE", str(first), str(end - 1))
            server.ask("CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))  # spares them settling who is who
        for server in self.servers[1:]:
            self.servers[0].ask("CLUSTER", "MEET", HOST, str(server.port), str(bus_port(server.port)))
        for number, replica in enumerate(replicas):
            master = str(masters[number % len(masters)].ask("CLUSTER", "MYID"))
            if not wait_until(lambda: _obeys(replica, "CLUSTER", "REPLICATE", master), START_LIMIT_S):  # noqa: B023 - at once
                raise ServerError(f"the replica on port {replica.port} does not get to know its master; see {replica.log}")

    def _is_whole(self, server: RedisServer) -> bool:
        facts = server.facts("CLUSTER", "INFO")
        met = facts.get("cluster_state") == "ok" and facts.get("cluster_known_nodes") == str(len(self.servers))
        return met and server.follows()


class RedisSentinel(_Group):
    """A master, its replicas, and Sentinels that fail over between them; the servers change roles when they do.

    With more than one Sentinel, more than half of them have to find that the master is down. Where the servers ask for
    a password (`requirepass`, or `masteruser` and `masterauth`), `config` has it for all of them, and Sentinels use it.
    """

    def __init__(
        self,
        directory: Path,
        *,
        master_port: int,
        replica_port: int,
        sentinel_port: int,
        more_replica_ports: Sequence[int] = (),
        more_sentinel_ports: Sequence[int] = (),
        config: Mapping[str, str] = NOTHING,
    ) -> None:
        # By default a replica waits 5 s for others to copy along with it.
        config = {"repl-diskless-sync-delay": "0", **config}
        following = {**config, "replicaof": f"{HOST} {master_port}"}
        self.master = RedisServer(directory / "master", master_port, config=config)
        self.replicas = tuple(
            RedisServer(directory / ("replica" if index == 0 else f"replica-{index + 1}"), port, config=following)
            for index, port in enumerate((replica_port, *more_replica_ports))
        )
        ports = (sentinel_port, *more_sentinel_ports)
        credentials = {"auth-user": config.get("masteruser", ""), "auth-pass": config.get("masterauth", "")}
        self.sentinels = tuple(
            SentinelServer(
                directory / ("sentinel" if index == 0 else f"sentinel-{index + 1}"),
                port,
                master_port=master_port,
                quorum=len(ports) // 2 + 1,
                config={name: value for name, value in credentials.items() if value},
            )
            for index, port in enumerate(ports)
        )
        self.servers = (self.master, *self.replicas, *self.sentinels)

    @property
    def replica(self) -> RedisServer:
        """The first replica."""
        return self.replicas[0]

    @property
    def sentinel(self) -> SentinelServer:
        """The first Sentinel."""
        return self.sentinels[0]

    @property
    def url(self) -> str:
        credentials = f":{self.master.password}@" if self.master.password else ""
        hosts = ",".join(f"{HOST}:{sentinel.port}" for sentinel in self.sentinels)
        return f"redis+sentinel://{credentials}{hosts}/{SENTINEL_NAME}/0"

    def _start_in_order(self) -> None:
        stores = (self.master, *self.replicas)
        for server in stores:
            server.start()
        # Sentinel asks a master for its replicas every 10 s only: the replicas have to be there when it asks first.
        if not wait_until(lambda: all(server.follows() for server in stores), START_LIMIT_S):
            raise ServerError(f"a replica of the master on port {self.master.port} does not follow it; see its log")
        for sentinel in self.sentinels:
            sentinel.start()
        if not wait_until(self._sentinels_know_all, START_LIMIT_S):
            raise ServerError(f"a Sentinel does not see the master and all others; see {self.sentinel.log}")

    def _sentinels_know_all(self) -> bool:
        return all(sentinel.sees(len(self.replicas), len(self.sentinels) - 1) for sentinel in self.sentinels)


def _obeys(server: RedisServer, *words: str) -> bool:
    """Whether the server carries a command out now."""
    try:
        server.ask(*words)
    except ServerError:
        return False
    return True


def _quoted(value: str) -> str:
    """A value as the configuration file of Redis wants it when it is empty or has blanks in it."""
    return json.dumps(value, ensure_ascii=False)


# The little of the Redis protocol that waiting and joining take
# (https://redis.io/docs/latest/develop/reference/protocol-spec/).
# A client library would retry and pool behind our back, where the point is to see what one server says right now.


def _ask(port: int, *words: str, password: str = "") -> Reply:
    """One command, one reply. An error reply, and no reply at all, raise ServerError."""
    try:
        with socket.create_connection((HOST, port), timeout=2) as link, link.makefile("rb") as stream:
            if password:
                link.sendall(_command_of("AUTH", password))
                _read_reply(stream)
            link.sendall(_command_of(*words))
            return _read_reply(stream)
    except OSError as error:
        raise ServerError(f"no answer on port {port} to {' '.join(words)}: {error}") from error


def _command_of(*words: str) -> bytes:
    parts = [f"${len(word.encode())}\r\n{word}\r\n" for word in words]
    return f"*{len(words)}\r\n{''.join(parts)}".encode()


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


def _fields(reply: Reply) -> dict[str, str]:
    """What Sentinel says about one server: names and values in turn."""
    words = [str(word) for word in reply] if isinstance(reply, list) else []
    return dict(zip(words[::2], words[1::2], strict=True))
