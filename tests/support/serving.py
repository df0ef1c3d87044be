"""Pods and workers for tests: in this process on a real socket, or as processes of their own that can be killed."""

import asyncio
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from time import monotonic
from typing import Any, Self

import httpx
import uvicorn

from gateway.app import Pod
from gateway.dev.servers.ports import HOST, free_port
from gateway.server.protocol import ConnectionLimits, http_protocol
from gateway.server.serve import QuietServer

ROOT = Path(__file__).parents[2]
SECRET_KEY = "a secret key for tests, 32 characters"
ADMIN_KEY = "an admin key for tests"
NO_TLS = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
"""For httpx clients of pods without TLS: to read all root certificates takes longer than most tests do."""
ADMIN = {"Authorization": f"Bearer {ADMIN_KEY}"}


async def wait_for(condition: Any, what: str, limit_s: float = 15.0) -> Any:
    """Waits until the (async) condition gives something true; what it gave. Fails with `what` after the limit."""
    deadline = monotonic() + limit_s
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        if monotonic() > deadline:
            raise AssertionError(f"waited {limit_s:g} s in vain: {what}")
        await asyncio.sleep(0.02)


@asynccontextmanager
async def served(pod: Pod, bounds: ConnectionLimits | None = None, **options: Any) -> AsyncIterator[httpx.AsyncClient]:
    """Serves a pod from this process over real HTTP; gives a client for it. Options are uvicorn's."""
    port = free_port()
    protocol = http_protocol(bounds)
    fixed: dict[str, Any] = {"http": protocol, "server_header": False, "log_config": None, "lifespan": "on", "ws": "none"}
    options = {**fixed, "proxy_headers": False, **options}
    server = QuietServer(uvicorn.Config(pod.app, host=HOST, port=port, **options))
    task = asyncio.create_task(server.serve())
    await wait_for(lambda: server.started or task.done(), "the pod starts")
    if task.done():
        await task
    try:
        async with httpx.AsyncClient(base_url=f"http://{HOST}:{port}", timeout=40, verify=NO_TLS) as client:
            yield client
    finally:
        server.should_exit = True
        await task


class GatewayProcess:
    """`python -m gateway <command>` as a process of its own, run in the tree `source`. Its output is kept in `log`."""

    def __init__(self, command: str, directory: Path, environment: Mapping[str, str], *, source: Path = ROOT) -> None:
        self.port = free_port()
        self._source = source
        self.log = directory / f"{command}-{self.port}.log"
        self._command = command
        self._environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")},
            "GATEWAY_SECRET_KEY": SECRET_KEY,
            "GATEWAY_ADMIN_KEY": ADMIN_KEY,
            "GATEWAY_PORT": str(self.port),
            "GATEWAY_DRAIN_NOTICE_S": "0",
            "GATEWAY_LOG_FORMAT": "json",
            **environment,
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    @property
    def started(self) -> bool:
        return self._process is not None

    @property
    def process(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, "not started"
        return self._process

    def spawn(self) -> Self:
        """Starts the process without waiting for it."""
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "gateway", self._command],
                cwd=self._source,
                env=self._environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        return self

    async def start(self) -> Self:
        """Starts it and waits until it works: a pod answers, a worker has logged its first line or still runs."""
        self.spawn()
        if self._command == "serve":
            await wait_for(self._answers, f"the pod answers; its log: {self.log}")
        return self

    async def _answers(self) -> bool:
        assert self.process.poll() is None, f"the pod ended with {self.process.returncode}: {self.output()}"
        async with httpx.AsyncClient(verify=NO_TLS) as client:
            try:
                answered = (await client.get(f"{self.url}/healthz")).status_code == 200
            except httpx.TransportError:
                return False
        # It may be another program that answered, and this one that could not listen.
        assert self.process.poll() is None, f"the pod ended with {self.process.returncode}: {self.output()}"
        return answered

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def signal(self, number: signal.Signals) -> None:
        """Sends a signal to this process alone."""
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL, and waits for the end."""
        self.process.kill()
        self.process.wait(10)

    def stop(self, limit_s: float = 30) -> int:
        """SIGTERM, and waits for the end; the exit status."""
        if self.process.poll() is None:
            self.process.terminate()
        try:
            return self.process.wait(limit_s)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
