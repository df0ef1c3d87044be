"""One measurement: a row's server on a core of its own, a load from another, and the processor time of everything."""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic, sleep
from typing import Any, NamedTuple, TypeVar
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import msgspec
import psutil

from gateway.dev.servers.ports import HOST
from scripts.benchmarks.load import Measured, Plan
from scripts.benchmarks.pauses import longest_ms
from scripts.benchmarks.seed import AGENT_ID, DOMAIN, QUESTION, session_id, token
from scripts.benchmarks.servers import ROOT, Servers

HERE = ROOT / "scripts" / "benchmarks"
GRAPHS = HERE / "graphs"
FOLDER = ROOT / ".bench"
GATEWAY = {
    "message": f"/api/chat/{AGENT_ID}/message",
    "beside-message": f"/api/chat/{AGENT_ID}/message",
    "stream": f"/api/chat/{AGENT_ID}/stream",
    "beside-stream": f"/api/chat/{AGENT_ID}/stream",
}
"""The rows of the gateway, each with the path that it is asked under; those `beside` are the gateway of another checkout."""
BESIDE = "beside-"
STATELESS = ("limit", "limit-tuned")
# As in production, and never reached here.
PRODUCTION = {
    "GATEWAY_GRAPHS": str(GRAPHS / "langgraph.json"),
    "GATEWAY_LOG_FORMAT": "json",
    "GATEWAY_LOG_LEVEL": "info",
    "GATEWAY_ADDRESS_RATE_LIMIT": "1000000/60",
    "GATEWAY_ADDRESS_SESSION_LIMIT": "1000000/60",
    "GATEWAY_LIMIT_MODE": "enforce",
}
READY_S = 60
STOPPED_S = 30
SETTLE_S = 0.3
"""What came due while a row was asleep is done by then."""
REST_S = 0.5
"""A worker brings the last turns to Postgres by then: they count too."""


class Result(msgspec.Struct):
    """One measurement of a row at a history length; what is in ms per turn is processor time. `rate`: see Plan."""

    row: str
    history: int
    turns_per_s: float
    p50_ms: float
    p99_ms: float
    server_ms: float
    redis_ms: float
    postgres_ms: float
    worker_ms: float
    pause_ms: float
    rate: float = 0


class Span(NamedTuple):
    """A measurement, and from when to when it went."""

    result: Result
    began: float
    ended: float


class Cpu(NamedTuple):
    """Seconds of processor time so far."""

    server: float
    redis: float
    postgres: float
    worker: float


class Serving(NamedTuple):
    """A row's server at work, with the gateway's worker if it has one."""

    row: str
    port: int
    servers: Servers
    server: psutil.Process
    worker: psutil.Process | None

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"


def take_cores() -> set[int]:
    """The core of the server under test. This process and all that it starts keep to the others."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("bench: the server and the load need a core each, and there is one")
    os.sched_setaffinity(0, set(cores[1:]))
    return {cores[0]}


@contextmanager
def serve(row: str, servers: Servers, cores: set[int], *, worker: bool = True, checkout: Path = ROOT) -> Iterator[Serving]:
    """The server of a row, pinned to `cores`, ready; and the gateway's worker. Both run in `checkout`."""
    port = int(servers.environment["GATEWAY_PORT"])
    environment = {
        **servers.environment,
        "PYTHONPATH": str(checkout),
        "DATABASE_URL": servers.postgres.url,
        "BENCH_PAUSES": str(servers.folder / "pauses"),
    }
    command = [sys.executable, "-m", "scripts.benchmarks.rows", row, str(port)]
    directory = checkout
    if row in GATEWAY:
        command = [sys.executable, "-P", str(HERE / "pauses.py"), "gateway", "serve"]
    elif row == "langgraph-dev":
        directory = servers.folder / "dev"
        command = _langgraph_dev(directory, port, environment)
    processes = []
    with (servers.folder / "server.log").open("wb") as log:
        try:
            processes.append(
                subprocess.Popen(
                    command,
                    env=environment,
                    stdout=log,
                    stderr=log,
                    cwd=directory,
                    preexec_fn=lambda: os.sched_setaffinity(0, cores),  # noqa: PLW1509  # this process has one thread
                )
            )
            if row in GATEWAY and worker:
                command = [sys.executable, "-m", "gateway", "worker"]
                processes.append(subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=directory))
            watched = [psutil.Process(process.pid) for process in processes]
            serving = Serving(row, port, servers, watched[0], watched[1] if len(watched) > 1 else None)
            _wait_until_ready(serving)
            yield serving
        except BaseException:
            print((servers.folder / "server.log").read_text(errors="replace")[-3000:], file=sys.stderr)
            raise
        finally:
            # SIGINT: a pod that has no balancer need not wait for it.
            for process in processes:
                process.send_signal(signal.SIGINT)
            for process in processes:
                try:
                    process.wait(STOPPED_S)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()


def _langgraph_dev(directory: Path, port: int, environment: dict[str, str]) -> list[str]:
    """Its command, set up as fast as its documentation has it.

    Logs from warnings on (at `info` it reaches half of this), no file of its state every ten seconds, no reload; ten jobs
    at a time, its default: with as many as there are visitors its queue runs empty, and then it sleeps for half a second.
    """
    directory.mkdir()
    graphs = {"bench": f"{GRAPHS}/canned.py:graph"}
    config = {"dependencies": [str(GRAPHS)], "graphs": graphs, "disable_persistence": True}
    (directory / "langgraph.json").write_text(json.dumps(config))
    environment |= {"LOG_LEVEL": "warning", "LANGSMITH_TRACING": "false", "LANGGRAPH_NO_VERSION_CHECK": "true"}
    tool = str(Path(sys.executable).parent / "langgraph")
    return [tool, "dev", "--port", str(port), "--no-browser", "--no-reload", "--n-jobs-per-worker", "10"]


def _wait_until_ready(serving: Serving) -> None:
    deadline = monotonic() + READY_S
    probe = "/ok" if serving.row == "langgraph-dev" else "/healthz"
    while True:
        try:
            with urlopen(serving.url + probe, timeout=2):  # noqa: S310  # an address of this machine
                return
        except HTTPError:
            return
        except OSError:
            if monotonic() > deadline or not serving.server.is_running() or serving.server.status() == psutil.STATUS_ZOMBIE:
                raise
            sleep(0.1)


def call(url: str, body: Any, headers: Mapping[str, str]) -> bytes:
    """One JSON call; what it is answered with. Raises HTTPError for what is not a 2xx."""
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json", **headers})  # noqa: S310
    with urlopen(request, timeout=60) as response:  # noqa: S310  # an address of this machine
        return bytes(response.read())


def plan_for(serving: Serving, numbers: range | list[int], *, connections: int, threads: list[str] | None = None) -> Plan:
    """What the visitors of these sessions send."""
    bodies = [
        json.dumps({"message": QUESTION, "session_id": session_id(one), "metadata": {"page": "/cart"}}) for one in numbers
    ]
    plan = Plan(port=serving.port, paths=["/message"] * len(bodies), bodies=bodies, connections=connections, seconds=0)
    if serving.row in GATEWAY:
        plan.paths = [GATEWAY[serving.row]] * len(bodies)
        plan.tokens = [token(one) for one in numbers]
        plan.headers = {"Origin": f"https://{DOMAIN}"}
        plan.stream = serving.row.endswith("stream")
    elif threads is not None:
        plan.paths = [f"/threads/{thread}/runs/wait" for thread in threads]
        plan.bodies = [
            json.dumps({"assistant_id": "bench", "input": {"messages": [{"role": "user", "content": QUESTION}]}})
        ] * len(bodies)
    return plan


async def load(plan: Plan, seconds: float, rate: float = 0) -> Measured:
    """Sends what the plan says for so long, from a process of its own. RuntimeError when anything is not answered well."""
    plan.seconds, plan.rate = seconds, rate
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "scripts.benchmarks.load", stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate(msgspec.json.encode(plan))
    if process.returncode:
        raise RuntimeError(f"the load ended with {process.returncode}")
    measured = msgspec.json.decode(output, type=Measured)
    if measured.failed:
        raise RuntimeError(f"{measured.failed} of {len(measured.latencies_ms)} requests failed: {measured.first_failure}")
    return measured


Item = TypeVar("Item")


def up_and_down(items: Sequence[Item], rounds: int) -> Iterator[Item]:
    """All in each round, in turn forwards and backwards: none comes always behind the same other one."""
    for number in range(rounds):
        yield from items if number % 2 == 0 else reversed(items)


@contextmanager
def asleep(rows: Sequence[Serving]) -> Iterator[None]:
    """Rows that wait for their turn are stopped, stores and all: one that idles takes time and caches of the one at work."""
    try:
        for serving in rows:
            _signal(serving, signal.SIGSTOP)
        yield
    finally:
        for serving in rows:
            _signal(serving, signal.SIGCONT)


@asynccontextmanager
async def awake(serving: Serving) -> AsyncIterator[None]:
    """One of the rows that are `asleep`, at work."""
    _signal(serving, signal.SIGCONT)
    try:
        await asyncio.sleep(SETTLE_S)
        yield
    finally:
        _signal(serving, signal.SIGSTOP)


def _signal(serving: Serving, number: signal.Signals) -> None:
    servers = serving.servers
    stores = [psutil.Process(servers.postgres.pid), psutil.Process(servers.redis.pid)]
    users = [serving.server, *([serving.worker] if serving.worker else [])]
    # A store is there whenever somebody may ask it.
    for process in [*stores, *users] if number == signal.SIGCONT else [*users, *stores]:
        process.send_signal(number)
        for child in process.children(recursive=True):
            try:
                child.send_signal(number)
            except psutil.NoSuchProcess:
                continue


async def measure(serving: Serving, plan: Plan, history: int, seconds: float, rate: float = 0) -> Span:
    """Loads a server that is warm; what came of it, without the pauses of its collector (`add_pauses`)."""
    before, began = cpu(serving), monotonic()
    measured = await load(plan, seconds, rate)
    ended = monotonic()
    if serving.worker:
        await asyncio.sleep(REST_S)
    after = cpu(serving)
    turns = len(measured.latencies_ms)
    # The next load goes on with other sessions.
    plan.first = (plan.first + turns) % len(plan.bodies)
    ordered = sorted(measured.latencies_ms)
    server, redis, postgres, worker = ((b - a) * 1000 / turns for a, b in zip(before, after, strict=True))
    result = Result(
        row=serving.row,
        history=history,
        turns_per_s=turns / measured.seconds,
        p50_ms=ordered[turns // 2],
        p99_ms=ordered[min(turns - 1, turns * 99 // 100)],
        server_ms=server,
        redis_ms=redis,
        postgres_ms=postgres,
        worker_ms=worker,
        pause_ms=0,
        rate=rate,
    )
    return Span(result, began, ended)


def add_pauses(span: Span, servers: Servers) -> Result:
    """The measurement with the longest pause of its collector, which a server writes down when it ends; not that of a server
    that is not ours."""
    if span.result.row != "langgraph-dev":
        span.result.pause_ms = longest_ms(servers.folder / "pauses", span.began, span.ended)
    return span.result


def cpu(serving: Serving) -> Cpu:
    """What everything has used so far."""
    return Cpu(
        spent(serving.server),
        spent(psutil.Process(serving.servers.redis.pid)),
        spent(psutil.Process(serving.servers.postgres.pid)),
        spent(serving.worker) if serving.worker else 0.0,
    )


def spent(process: psutil.Process) -> float:
    """Processor seconds of a process and its children, those that have ended included."""
    times = process.cpu_times()
    total = float(times.user + times.system + times.children_user + times.children_system)
    for child in process.children(recursive=True):
        try:
            own = child.cpu_times()
        except psutil.NoSuchProcess:
            continue
        total += own.user + own.system
    return total
