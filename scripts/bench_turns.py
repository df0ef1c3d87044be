"""What a turn costs, beside the limit and beside what else could be used: `scripts/bench turns`.

The server under test has one core to itself; the load, Redis, Postgres and the worker share the others. Each round measures every
row, one after the other, on stores that are filled anew; the table has the medians of the rounds.
"""

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from time import monotonic, sleep
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

import msgspec
import psutil
from bench_load import Measured, Plan
from bench_pauses import longest_ms
from bench_plot import plot
from bench_seed import AGENT, QUESTION, fill_gateway, fill_peer, session_id
from bench_servers import KEY, Servers, own_servers

FOLDER = Path(".bench")
SCRIPTS = Path(__file__).parent
GATEWAY = {"message": "/api/chat/bench/message", "stream": "/api/chat/bench/stream"}
ROWS = {
    "limit": "bare Starlette and LangGraph, no state",
    "limit-tuned": "the same, collector as the gateway's",
    "message": "gateway /message",
    "stream": "gateway /stream",
    "first": "FastAPI, SQLAlchemy, one JSONB column",
    "rows": "Starlette, asyncpg, a row per message",
    "saver-exit": "AsyncPostgresSaver, durability exit",
    "saver-async": "AsyncPostgresSaver, durability async",
    "langgraph-dev": "langgraph dev",
}
SHARE = 0.8
STATELESS = ("limit", "limit-tuned")


class Result(msgspec.Struct):
    """One measurement: a row at a history length. CPU is milliseconds of each process's time per turn."""

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


class Cpu(NamedTuple):
    """Seconds of processor time so far."""

    server: float
    redis: float
    postgres: float
    worker: float


async def measure_turns(options: argparse.Namespace) -> None:
    """Prints the table and writes it as JSON and as a plot into .bench."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        sys.exit("bench: the server and the load need a core each, and there is one")
    server_cores, other_cores = {cores[0]}, set(cores[1:])
    os.sched_setaffinity(0, other_cores)
    rows = options.rows.split(",") if options.rows else list(ROWS)
    unknown = set(rows) - set(ROWS)
    if unknown:
        sys.exit(f"bench: no such row: {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    histories = [int(one) for one in options.histories.split(",")]
    results: list[Result] = []
    for number in range(options.rounds):
        for history in histories:
            for row in rows:
                if row in STATELESS and history != histories[0]:
                    continue
                measured = await _measure(row, history, options, server_cores)
                results.append(measured)
                print(f"round {number + 1}: {_line(measured)}", flush=True)
    medians = _medians(results)
    paced = _medians(await _paced(medians, options, server_cores))
    print()
    print("\n".join([f"{HEAD}   CPU: ms per turn", *map(_line, medians)]))
    if paced:
        print(f"\nat a fixed rate, {SHARE:.0%} of what the gateway can do at most:")
        print("\n".join([HEAD, *map(_line, paced)]))
    print()
    print("\n".join(f"{'  ' if one.holds else '! '}{one.text}" for one in targets(medians, paced)))
    FOLDER.mkdir(exist_ok=True)
    everything = {"medians": medians, "paced": paced, "rounds": results}
    (FOLDER / "turns.json").write_bytes(msgspec.json.format(msgspec.json.encode(everything), indent=2))
    bars: dict[str, list[tuple[str, float]]] = {}
    for one in medians:
        bars.setdefault(ROWS[one.row], []).append((f"history {one.history}", one.turns_per_s))
    (FOLDER / "turns.svg").write_text(plot("Turns per second on one core, by stored messages", bars))
    print(f"\nas JSON and as a plot: {FOLDER}/turns.json, {FOLDER}/turns.svg")


async def _paced(medians: Sequence[Result], options: argparse.Namespace, cores: set[int]) -> list[Result]:
    """The gateway and the limit under load that arrives at a fixed rate, in turn, for each history length."""
    results = []
    for number in range(options.rounds):
        for one in medians:
            if one.row != "message":
                continue
            for row in ("limit", "message"):
                rate = one.turns_per_s * SHARE
                measured = await _measure(row, one.history, options, cores, rate)
                results.append(measured)
                print(f"round {number + 1}, {rate:,.0f} a second: {_line(measured)}", flush=True)
    return results


async def _measure(row: str, history: int, options: argparse.Namespace, cores: set[int], rate: float = 0) -> Result:
    with own_servers(GATEWAY_GRAPHS=str(SCRIPTS / "bench_langgraph.json"), GATEWAY_LOG_FORMAT="json") as servers:
        if row in GATEWAY:
            await fill_gateway(servers, options.sessions, history)
        elif row not in STATELESS and row != "langgraph-dev":
            await fill_peer(servers, row, options.sessions, history)
        with _server(row, servers, cores) as (port, server, worker):
            paths = await _ready(row, port, options.sessions, history)
            bodies = [_body(row, number) for number in range(options.sessions)]
            plan = Plan(
                port=port, paths=paths, bodies=bodies, seconds=options.warm_up, connections=options.connections, stream=row == "stream"
            )
            await _load(plan)
            before, began = _cpu(servers, server, worker), monotonic()
            plan.seconds, plan.rate = options.seconds, rate
            measured = await _load(plan)
            after, ended = _cpu(servers, server, worker), monotonic()
            if measured.failed:
                raise RuntimeError(f"{row}: {measured.failed} of {len(measured.latencies_ms)} failed: {measured.first_failure}")
        pause_ms = longest_ms(servers.folder / "pauses", began, ended)
    turns = len(measured.latencies_ms)
    spent = [(b - a) * 1000 / turns for a, b in zip(before, after, strict=True)]
    ordered = sorted(measured.latencies_ms)
    return Result(
        row,
        history,
        turns / measured.seconds,
        ordered[turns // 2],
        ordered[min(turns - 1, turns * 99 // 100)],
        *spent,
        pause_ms,
        rate,
    )


def _body(row: str, number: int) -> str:
    if row == "langgraph-dev":
        return json.dumps({"assistant_id": "bench", "input": {"messages": [{"role": "user", "content": QUESTION}]}})
    return json.dumps({"message": QUESTION, "session_id": session_id(number), "metadata": {"page": "/cart"}})


async def _load(plan: Plan) -> Measured:
    process = await asyncio.create_subprocess_exec(
        sys.executable, str(SCRIPTS / "bench_load.py"), stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    output, _ = await process.communicate(msgspec.json.encode(plan))
    return msgspec.json.decode(output, type=Measured)


@contextmanager
def _server(row: str, servers: Servers, cores: set[int]) -> Iterator[tuple[int, psutil.Process, psutil.Process | None]]:
    """The server of a row, pinned, and the gateway's worker."""
    port = int(servers.environment["GATEWAY_PORT"])
    command = [sys.executable, str(SCRIPTS / "bench_rows.py"), row, str(port)]
    environment = {**servers.environment, "DATABASE_URL": servers.postgres.url, "LANGSMITH_TRACING": "false", "BENCH_PAUSES": str(servers.folder / "pauses")}
    processes = []
    directory = None
    if row in GATEWAY:
        command = [sys.executable, str(SCRIPTS / "bench_gateway.py"), "serve"]
    elif row == "langgraph-dev":
        directory = servers.folder / "dev"
        directory.mkdir()
        (directory / "langgraph.json").write_text(json.dumps({"dependencies": [str(SCRIPTS)], "graphs": {"bench": f"{SCRIPTS}/bench_graph.py:graph"}}))
        tool = Path(sys.executable).parent / "langgraph"
        command = [str(tool), "dev", "--port", str(port), "--no-browser", "--no-reload", "--n-jobs-per-worker", "32"]
    with (servers.folder / "server.log").open("wb") as log:
        processes.append(
            subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, cwd=directory, preexec_fn=lambda: os.sched_setaffinity(0, cores)
            )
        )
        if row in GATEWAY:
            processes.append(subprocess.Popen([sys.executable, "-m", "gateway", "worker"], env=environment, stdout=log, stderr=log))
        try:
            yield port, psutil.Process(processes[0].pid), psutil.Process(processes[1].pid) if len(processes) > 1 else None
        finally:
            for process in processes:
                process.send_signal(signal.SIGINT)
            for process in processes:
                try:
                    process.wait(30)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
            if os.environ.get("BENCH_LOG"):
                Path(os.environ["BENCH_LOG"]).write_bytes((servers.folder / "server.log").read_bytes())


async def _ready(row: str, port: int, sessions: int, history: int) -> list[str]:
    """Waits until the server answers; the path of each session's messages."""
    deadline = monotonic() + 60
    url = f"http://127.0.0.1:{port}"
    probe = {"langgraph-dev": "/ok"}.get(row, "/healthz")
    while True:
        try:
            with urlopen(url + probe, timeout=2):
                break
        except OSError as error:
            if getattr(error, "code", 0) == 404:
                break
            if monotonic() > deadline:
                raise
            sleep(0.1)
    if row in GATEWAY:
        definition = {"graph": "bench", "rate_limit": AGENT["rate_limit"]}
        call(f"{url}/api/agents/bench", definition, "PUT")
        return [GATEWAY[row]] * sessions
    if row == "langgraph-dev":
        from bench_seed import fill_langgraph_dev

        return [f"/threads/{thread}/runs/wait" for thread in await fill_langgraph_dev(port, sessions, history)]
    return ["/message"] * sessions


def call(url: str, body: Any, method: str = "POST") -> Any:
    """One JSON call with the admin key."""
    headers = {"Content-Type": "application/json", "Authorization": f"Bearer {KEY}"}
    with urlopen(Request(url, json.dumps(body).encode(), headers, method=method)) as response:
        return json.loads(response.read() or b"null")


def _cpu(servers: Servers, server: psutil.Process, worker: psutil.Process | None) -> Cpu:
    return Cpu(
        _spent(server),
        _spent(psutil.Process(servers.redis.pid)),
        _spent(psutil.Process(servers.postgres.pid)),
        _spent(worker) if worker else 0.0,
    )


def _spent(process: psutil.Process) -> float:
    """Processor seconds of a process and its children, those that have ended included."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        times = one.cpu_times()
        total += times.user + times.system
    ended = process.cpu_times()
    return total + ended.children_user + ended.children_system


def _medians(results: Sequence[Result]) -> list[Result]:
    groups: dict[tuple[str, int], list[Result]] = {}
    for one in results:
        groups.setdefault((one.row, one.history), []).append(one)
    return [
        Result(row, history, *(median(getattr(one, field) for one in group) for field in Result.__struct_fields__[2:]))
        for (row, history), group in groups.items()
    ]


HEAD = (
    f"{'':<42}{'history':>8}{'turns/s':>9}{'p50 ms':>8}{'p99 ms':>8}{'server':>8}{'redis':>7}{'postgres':>9}{'worker':>8}{'gc ms':>7}"
)


def _line(one: Result) -> str:
    return (
        f"{ROWS[one.row]:<42}{one.history:>8}{one.turns_per_s:>9,.0f}{one.p50_ms:>8.1f}{one.p99_ms:>8.1f}"
        f"{one.server_ms:>8.2f}{one.redis_ms:>7.2f}{one.postgres_ms:>9.2f}{one.worker_ms:>8.2f}{one.pause_ms:>7.1f}"
    )


class Target(NamedTuple):
    """A figure that has to hold, in words."""

    holds: bool
    text: str


def targets(medians: Sequence[Result], paced: Sequence[Result]) -> list[Target]:
    """What the gateway has to reach, as far as what it is compared with was measured."""
    by = {(one.row, one.history): one for one in medians}
    found = []

    def ratio(history: int, other: str, other_history: int, least: float) -> None:
        ours, theirs = by.get(("message", history)), by.get((other, other_history))
        if ours and theirs:
            value = ours.turns_per_s / theirs.turns_per_s
            name = ROWS[other] if other != "message" else f"itself at {other_history}"
            found.append(Target(value >= least, f"history {history:>3}: {value:5.2f} of {name} (at least {least:g})"))

    first = min((history for row, history in by if row == "limit"), default=0)
    ratio(0, "limit", first, 0.70)
    ratio(50, "limit", first, 0.60)
    ratio(200, "limit", first, 0.60)
    ratio(200, "message", 50, 0.95)
    ratio(50, "first", 50, 3)
    ratio(200, "first", 200, 5)
    ratio(50, "saver-exit", 50, 2)
    ratio(50, "langgraph-dev", 50, 5)
    for one in medians:
        if one.row == "message":
            for name, value, most in (
                ("Redis", one.redis_ms, 0.15),
                ("Postgres", one.postgres_ms, 0.10),
            ):
                found.append(Target(value <= most, f"history {one.history:>3}: {name} {value:.2f} ms CPU per turn (at most {most:.2f})"))
            found.append(Target(one.pause_ms <= 20, f"history {one.history:>3}: longest pause of the collector {one.pause_ms:.1f} ms (at most 20)"))
    limits = {one.history: one for one in paced if one.row == "limit"}
    for one in paced:
        if one.row == "message":
            most = limits[one.history].p99_ms
            found.append(Target(one.p99_ms <= most, f"history {one.history:>3}: p99 at {SHARE:.0%} load {one.p99_ms:.1f} ms (the limit's: {most:.1f})"))
    return found
