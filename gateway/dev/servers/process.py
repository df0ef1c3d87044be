"""Real Redis and PostgreSQL servers as child processes, for the development command, the tests and the scripts.

It owns how such a server is found, configured, started, waited for and ended. Nothing here runs in production, where
the servers exist already; so it imports the standard library only, and finds the packages of the extra
`local` without importing them.

What always holds: it ends only processes that it started. A server that outlived an earlier run (its parent was killed)
is ended when the next run starts on the same directory, and only if the pid file in that directory names a process
whose command line names that directory. A directory belongs to one parent at a time; a lock in it sees to that, and the
operating system gives the lock back when the parent dies. Children are in a session of their own: Ctrl-C in a terminal
reaches only the parent, which stops them in its own order. All listen on 127.0.0.1 only, without passwords."""

import contextlib
import fcntl
import os
import pwd
import signal
import subprocess
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import IO, ClassVar, Self

from gateway.dev.servers.ports import PortTaken, ServerError, port_is_free
from gateway.dev.servers.programs import program_environment, run_program, tail

START_LIMIT_S = 60.0

STOP_LIMIT_S = 20.0

POLL_S = 0.02


NOTHING: Mapping[str, str] = MappingProxyType({})


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

    def _environment(self) -> dict[str, str]:
        """The environment of the program."""
        return program_environment()

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
            self._process = _spawn(self._command(), self.directory, log, self._account(), self._environment())
        while not self._answers():
            if not self.running:
                text = _text_from(self.log, begin)
                if self._will_pass(text) and time.monotonic() < deadline:
                    return False
                self._refuse_taken_port()
                raise ServerError(f"{self.kind} on port {self.port} exited at its start:\n{tail(text)}")
            if time.monotonic() > deadline:
                text = _text_from(self.log, begin)
                raise ServerError(
                    f"{self.kind} on port {self.port} did not answer within {START_LIMIT_S:.0f} s:\n{tail(text)}"
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
        if not wait_until(lambda: port_is_free(self.port), 1.0):
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
            wait_until(lambda: not self._is_for_this_directory(pid), STOP_LIMIT_S)

    def _is_for_this_directory(self, pid: int) -> bool:
        return f" {self._mark} " in f"{_command_line(pid)} "


def _spawn(
    command: list[str],
    directory: Path,
    log: IO[bytes],
    account: pwd.struct_passwd | None,
    environment: Mapping[str, str],
) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(  # noqa: S603 - our own arguments
            command,
            cwd=directory,
            env=environment,
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


def _command_line(pid: int) -> str:
    """The command line of a process, words separated by blanks; empty when the process is gone."""
    if Path("/proc/self/cmdline").exists():
        try:
            return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            return ""
    try:
        return run_program(["/bin/ps", "-ww", "-o", "command=", "-p", str(pid)]).strip()
    except ServerError:
        return ""


def child_processes(pid: int) -> list[int]:
    """The process ids of the direct children of a process."""
    if Path("/proc/self/stat").exists():
        pairs = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):  # gone meanwhile
                # pid (name) state parent ...; the name may hold blanks and brackets
                pairs.append((int(entry.parent.name), int(entry.read_text(errors="replace").rpartition(")")[2].split()[1])))
    else:
        lines = run_program(["/bin/ps", "-A", "-o", "pid=,ppid="]).splitlines()
        pairs = [(int(child), int(parent)) for child, parent in map(str.split, lines)]
    return [child for child, parent in pairs if parent == pid]


def wait_until(condition: Callable[[], bool], limit_s: float) -> bool:
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
