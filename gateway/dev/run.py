"""The development server: a real Redis, a real PostgreSQL, the gateway and a worker, started and stopped together."""

import asyncio
import json
import os
import secrets
import shlex
import shutil
import sys
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from time import monotonic, time
from typing import TypeVar

import msgspec

from gateway.app import Stores, build_pod, build_worker
from gateway.dev.demo import demo_routes
from gateway.dev.servers.ports import PortTaken, ServerError, free_port, port_is_free
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.process import Server
from gateway.dev.servers.redis import RedisServer
from gateway.server.serve import on_signals, serve_pod
from gateway.settings import Settings, load_settings
from persistence.errors import PostgresUnavailable
from persistence.model.agents import AgentDefinition
from persistence.postgres.migrate import load_migrations, migrate
from persistence.retry import Attempts, Backoff
from persistence.worker import Worker

REDIS_PORT = 6390
POSTGRES_PORT = 5490
PORT_ATTEMPTS = 5
DRAIN_S = 10.0
MIGRATE_S = 10.0
ServerT = TypeVar("ServerT", bound=Server)
DEMO = {"delay_ms": 700, "chunks": 14}
"""So that a newcomer sees the demo agent write."""


class DevOptions(msgspec.Struct, frozen=True):
    """What the command line says."""

    port: int
    data: Path
    worker: bool


async def run_dev(options: DevOptions, environment: Mapping[str, str]) -> None:
    """Runs everything until SIGINT or SIGTERM. Raises ServerError, CannotListen, SettingsError or PersistenceError."""
    # Checked between the steps of the start, which are short, so that no step is cancelled half-way.
    interrupted = asyncio.Event()
    on_signals(interrupted.set)
    if not 1 <= options.port <= 65_535:
        raise ServerError(f"--port {options.port} is not between 1 and 65535")
    if not port_is_free(options.port):
        raise ServerError(f"port {options.port} is in use: choose another with --port")
    async with AsyncExitStack() as stack:
        options.data.mkdir(parents=True, exist_ok=True)
        variables = {name: value for name, value in environment.items() if name.startswith("GATEWAY_")}
        shown: dict[str, str] = {}
        if not variables.get("GATEWAY_REDIS_URL"):
            redis = await _start(stack, REDIS_PORT, lambda port: RedisServer(options.data / "redis", port))
            variables["GATEWAY_REDIS_URL"] = redis.url
            shown["redis"] = f"{_redis_cli()} -p {redis.port}"
        if interrupted.is_set():
            return
        if not variables.get("GATEWAY_DATABASE_URL"):
            folder = options.data / "postgres"
            postgres = await _start(stack, POSTGRES_PORT, lambda port: PostgresServer(folder, port, database="gateway"))
            variables["GATEWAY_DATABASE_URL"] = postgres.url
            psql = "psql" if shutil.which("psql") else shlex.quote(_shown_path(postgres.psql))
            shown["postgres"] = f"{psql} {postgres.url}"
        if interrupted.is_set():
            return
        settings = dev_settings(options, variables)
        stores = Stores(settings)
        stack.push_async_callback(stores.close)
        await _migrate(stores)
        pod = await build_pod(settings, stores, demo_routes(stores))
        await stores.agents.put("demo", AgentDefinition(graph="echo", config=DEMO))
        if options.worker:
            worker = await build_worker(settings, stores)
            await stack.enter_async_context(_working(worker))
        if interrupted.is_set():
            return
        _print_summary(options, settings, shown)
        # From here on the signals are the pod's.
        await serve_pod(pod)
        print("stopping", file=sys.stderr)


async def _start(stack: AsyncExitStack, preferred_port: int, make: Callable[[int], ServerT]) -> ServerT:
    """Starts a server that stops with the stack: on the preferred port, or on another one where a program has that.

    It may be taken while the server starts, say by a second development server: making a database takes seconds.
    """
    port = preferred_port if port_is_free(preferred_port) else free_port()
    for _ in range(PORT_ATTEMPTS):
        server = make(port)
        try:
            await asyncio.to_thread(server.start)
        except PortTaken:
            port = free_port()
            continue
        stack.callback(server.stop)
        return server
    raise ServerError(f"other programs took {PORT_ATTEMPTS} ports, one after the other; the last was {server.port}")


def _redis_cli() -> str:
    return next((name for name in ("redis-cli", "valkey-cli") if shutil.which(name)), "redis-cli")


def _shown_path(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)


def dev_settings(options: DevOptions, variables: dict[str, str]) -> Settings:
    """The settings, with keys of the data folder's own, so that tokens survive a restart."""
    file = options.data / "keys.json"
    if not file.exists():
        with os.fdopen(os.open(file, os.O_WRONLY | os.O_CREAT, 0o600), "w") as out:
            json.dump({"SECRET_KEY": secrets.token_urlsafe(32), "ADMIN_KEY": secrets.token_hex(16)}, out)
    for name, value in json.loads(file.read_text()).items():
        variables.setdefault(f"GATEWAY_{name}", value)
    # Everybody who opens a session comes from the same address here.
    variables.setdefault("GATEWAY_ADDRESS_SESSION_LIMIT", "600/60")
    # There is no balancer to be given notice.
    variables.setdefault("GATEWAY_DRAIN_NOTICE_S", "0")
    return load_settings({**variables, "GATEWAY_PORT": str(options.port)})


async def _migrate(stores: Stores) -> None:
    attempts = Attempts(Backoff(0.2, 0.2), deadline_s=monotonic() + MIGRATE_S)
    while True:
        try:
            await migrate(stores.postgres, load_migrations())
            return
        except PostgresUnavailable as error:
            await attempts.pause(error)


@asynccontextmanager
async def _working(worker: Worker) -> AsyncIterator[None]:
    """The worker runs beside the pod, and flushes what is left when the pod has stopped."""
    task = asyncio.create_task(worker.run())
    yield
    worker.stop()
    await task
    await worker.drain(DRAIN_S)


def _print_summary(options: DevOptions, settings: Settings, shown: Mapping[str, str]) -> None:
    url = f"http://127.0.0.1:{options.port}"
    session_id = f"session_{int(time() * 1000)}_{secrets.token_hex(6)}"
    key = f"{settings.key_prefix}:{{0}}:session:{session_id}"
    body = json.dumps({"message": "Hello", "session_id": session_id, "metadata": {"website_domain": "127.0.0.1"}})
    lines = [
        "",
        f"  gateway    {url}   (demo page, agent `demo` on the graph `echo`)",
        f"  admin key  {settings.admin_key}",
        f"  data       {options.data}",
        "",
        "  say hello:",
        f"    curl -s {url}/api/chat/demo/message -H 'Content-Type: application/json' -d '{body}'",
    ]
    if "redis" in shown:
        lines += ["  look at that session in Redis:", f"    {shown['redis']} HGETALL '{key}'"]
        if not shutil.which(shown["redis"].split()[0]):
            lines += ["    (redis-cli is not installed: Debian's package is redis-tools)"]
    if "postgres" in shown:
        query = "SELECT role, content FROM agent_messages ORDER BY created_at DESC LIMIT 10"
        lines += ["  and in Postgres:", f"    {shown['postgres']} -c '{query}'"]
    if not options.worker:
        lines += ["", "  the worker is left out: nothing reaches Postgres, and no session gets a TTL"]
    lines += ["", "  Ctrl-C stops all of it.", ""]
    print("\n".join(lines), flush=True)
