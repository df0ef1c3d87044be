"""`python -m gateway ...` as a process: commands that end by themselves, and the development server."""

import asyncio
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Self

import msgspec

from gateway.dev.servers.ports import free_port
from tests.support.serving import ROOT, wait_for


class Done(msgspec.Struct):
    """How a command ended."""

    status: int
    out: str
    error: str


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """This process's environment, its own settings of the gateway left out."""
    return {**{name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")}, **variables}


async def run_gateway(*arguments: str, variables: Mapping[str, str], stdin: str = "", limit_s: float = 60) -> Done:
    """Runs a command to its end."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "gateway",
        *arguments,
        cwd=ROOT,
        env=environment(variables),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        out, error = await asyncio.wait_for(process.communicate(stdin.encode()), limit_s)
    except BaseException:
        process.kill()
        await process.wait()
        raise
    assert process.returncode is not None
    return Done(process.returncode, out.decode(), error.decode())


def processes_of(directory: Path) -> list[str]:
    """The command lines of all processes that work in a directory or name it."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            line = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            place = os.readlink(folder / "cwd")
        except OSError:
            continue
        if int(folder.name) != os.getpid() and (str(directory) in line or place.startswith(str(directory))):
            found.append(f"{folder.name} {line.strip()}")
    return found


class DevServer:
    """`python -m gateway dev` on a folder of its own. What it prints is in `printed`."""

    def __init__(self, data: Path, *options: str) -> None:
        self.port = free_port()
        self.data = data
        self._log = data.parent / f"dev-{self.port}.log"
        self._options = options
        self.process: subprocess.Popen[bytes]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def printed(self) -> str:
        return self._log.read_text()

    def spawn(self) -> Self:
        """Starts it without waiting."""
        command = [sys.executable, "-m", "gateway", "dev", "--data", str(self.data), "--port", str(self.port)]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *self._options], cwd=ROOT, env=environment({}), stdout=log, stderr=log, start_new_session=True
            )
        return self

    async def start(self) -> Self:
        """Starts it and waits until it says how to stop it and answers."""
        self.spawn()
        await wait_for(lambda: "Ctrl-C" in self.printed or self.process.poll() is not None, "the summary", 60)
        assert self.process.poll() is None, self.printed

        def answers() -> bool:
            asked = ["curl", "-sf", "--max-time", "5", f"{self.url}/readyz"]
            return subprocess.run(asked, check=False, capture_output=True).returncode == 0

        await wait_for(answers, f"it is ready: {self.printed}", 30)
        return self

    def line(self, beginning: str) -> str:
        """The printed line that begins so."""
        (found,) = (line.strip() for line in self.printed.splitlines() if line.strip().startswith(beginning))
        return found

    def addresses(self) -> tuple[int, str]:
        """The port of its Redis and the URL of its Postgres, from the printed lines."""
        redis_port = re.search(r" -p (\d+) HGETALL ", self.printed)
        postgres_url = re.search(r" (postgresql://\S+) -c ", self.printed)
        assert redis_port and postgres_url, self.printed
        return int(redis_port[1]), postgres_url[1]

    async def stop(self, number: signal.Signals = signal.SIGINT) -> int:
        """Sends a signal and waits for the end; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(number)
        return await asyncio.to_thread(self.process.wait, 60)

    def clear(self) -> None:
        """Ends what a failed test left: the process, and then whatever it started in its folder."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for left in processes_of(self.data):
            try:
                os.kill(int(left.split()[0]), signal.SIGKILL)
            except ProcessLookupError:
                continue


async def paste(line: str) -> Done:
    """Runs a line as if pasted into a terminal."""
    done = await asyncio.to_thread(
        subprocess.run, ["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=30, check=False
    )
    return Done(done.returncode, done.stdout, done.stderr)


def program_of(line: str) -> str:
    """The program that a line runs."""
    return shlex.split(line)[0]
