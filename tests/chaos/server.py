"""The single Redis server of a run, whose clock can be set back and whose disk can be full."""

import os
import resource
from collections.abc import Mapping
from pathlib import Path

from gateway.dev.servers.process import NOTHING
from gateway.dev.servers.redis import RedisServer

LIBRARIES = ("/usr/lib/*/faketime/libfaketimeMT.so.1", "/usr/lib/faketime/libfaketimeMT.so.1")
"""Where the packages of Linux distributions put the library that tells a process another time."""
NOTICED_S = 1
"""How often it looks at the file that says which."""


def find_faketime() -> Path | None:
    """The library libfaketime (Debian: the package faketime); None where it is not installed."""
    found = [path for pattern in LIBRARIES for path in Path("/").glob(pattern.lstrip("/"))]
    return found[0] if found else None


class ChaosServer(RedisServer):
    """With an `own_clock` its time is that of the machine plus `clock_s` seconds."""

    def __init__(self, directory: Path, port: int, *, own_clock: bool = False, config: Mapping[str, str] = NOTHING) -> None:
        super().__init__(directory, port, config=config)
        self._own_clock = own_clock
        self._clock = directory / "clock"
        self._clock_s = 0

    @property
    def clock_s(self) -> int:
        """How many seconds the clock of the server is before that of the machine. Set while it runs, it jumps."""
        return self._clock_s

    @clock_s.setter
    def clock_s(self, seconds: int) -> None:
        self._clock_s = seconds
        unfinished = self._clock.with_suffix(".unfinished")
        unfinished.write_text(f"{seconds:+d}\n")
        unfinished.rename(self._clock)

    @property
    def append_only_files(self) -> Path:
        """The folder of the append-only file, which is several."""
        return self.directory / "appendonlydir"

    def newest_commands(self) -> Path:
        """The file to which commands are appended now."""
        return max(
            self.append_only_files.glob("*.incr.aof"),
            key=lambda path: int(path.name.removesuffix(".incr.aof").split(".")[-1]),
        )

    def fill_disk(self, left_bytes: int) -> None:
        """No file of the server can grow any more, but for what is left of the one with the newest commands."""
        size = self.newest_commands().stat().st_size + left_bytes
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, (size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    def empty_disk(self) -> None:
        resource.prlimit(self.pid, resource.RLIMIT_FSIZE, resource.getrlimit(resource.RLIMIT_FSIZE))

    def _command(self) -> list[str]:
        # A write beyond the limit has to fail, not to end the process. The shell becomes the server: the process id stays.
        return ["/bin/sh", "-c", 'trap "" XFSZ; exec "$@"', "sh", *super()._command()]

    def _environment(self) -> dict[str, str]:
        library = find_faketime() if self._own_clock else None
        if library is None:
            return super()._environment()
        self.clock_s = self._clock_s
        return super()._environment() | {
            "LD_PRELOAD": os.pathsep.join(filter(None, (str(library), os.environ.get("LD_PRELOAD")))),
            "FAKETIME_TIMESTAMP_FILE": str(self._clock),
            "FAKETIME_CACHE_DURATION": str(NOTICED_S),
            # What measures durations goes on: only the time of day jumps.
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        }
