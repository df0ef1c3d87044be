"""The command line: `serve`, `worker`, `migrate`, `agents`, `dev`."""

import argparse
import asyncio
import gc
import json
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import uvicorn
import uvloop

from gateway.api.agents import put_audited, view
from gateway.app import Pod, Stores, build_pod, build_worker, warn_if_not_migrated
from gateway.audit import at_the_command_line, audited
from gateway.dev import DevOptions, run_dev
from gateway.http import http_protocol
from gateway.logs import configure_logs, contain_errors
from gateway.problems import Problem
from gateway.runtime import GraphError
from gateway.servers import ServerError
from gateway.settings import Settings, SettingsError, load_settings
from persistence.agents import AgentDefinition
from persistence.errors import PersistenceError
from persistence.keys import masked
from persistence.migrate import load_migrations, migrate
from persistence.outbox import DeadLetter
from persistence.postgres import Postgres
from persistence.records import is_fact

STORES = ("redis_url", "database_url")
KEEP_ALIVE_S = 75
"""Longer than balancers keep an idle connection: they close it, not the pod, which could do so under the next request."""


class QuietServer(uvicorn.Server):
    """uvicorn, with the signals left to the command that runs it."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def main(arguments: Sequence[str]) -> int:
    """Runs a command; its exit status."""
    options = _parser().parse_args(arguments)
    contain_errors()
    try:
        command: Callable[[argparse.Namespace], Coroutine[Any, Any, None]] = options.command
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(command(options))
    except (SettingsError, PersistenceError, GraphError, ServerError, Problem) as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gateway", description="The session gateway.")
    commands = parser.add_subparsers(required=True, metavar="command")

    serve = commands.add_parser("serve", help="run a pod")
    serve.set_defaults(command=_serve)

    worker = commands.add_parser("worker", help="run a write-behind worker")
    worker.set_defaults(command=_worker)

    migrating = commands.add_parser("migrate", help="bring the database to this version")
    migrating.set_defaults(command=_migrate)

    dev = commands.add_parser("dev", help="run everything on this machine, Redis and Postgres included")
    dev.add_argument("--port", type=int, default=8000, help="port of the gateway (8000)")
    dev.add_argument("--data", type=Path, default=Path(".gateway"), help="folder of all data (.gateway)")
    dev.add_argument("--no-worker", action="store_true", help="leave the worker out: nothing reaches Postgres")
    dev.set_defaults(command=_dev)

    agents = commands.add_parser("agents", help="put, show, list and delete agents")
    actions = agents.add_subparsers(required=True, metavar="action")
    put = actions.add_parser("put", help="create an agent, or replace its definition")
    put.add_argument("name", help="name, or UUID of an agent that exists")
    put.add_argument("--graph", help="the graph that answers")
    put.add_argument("--definition", type=argparse.FileType("rb"), help="file with the definition as JSON, - for stdin")
    put.set_defaults(command=_agents_put)
    show = actions.add_parser("show", help="show an agent")
    show.add_argument("name")
    show.set_defaults(command=_agents_show)
    actions.add_parser("list", help="list agents").set_defaults(command=_agents_list)
    delete = actions.add_parser("delete", help="delete an agent")
    delete.add_argument("name")
    delete.set_defaults(command=_agents_delete)

    dead = commands.add_parser("dead", help="list dead letters, or retry them")
    dead.add_argument("--retry", action="store_true", help="put them back on the outbox")
    dead.set_defaults(command=_dead)
    return parser


def _settings(*required: str) -> Settings:
    settings = load_settings(os.environ, required)
    configure_logs(settings.log_format, settings.log_level)
    return settings


async def _serve(options: argparse.Namespace) -> None:
    settings = _settings(*STORES, "secret_key", "admin_key")
    stores = Stores(settings)
    try:
        pod = await build_pod(settings, stores)
        await warn_if_not_migrated(stores.postgres)
        tune_collector()
        await serve_pod(pod)
    finally:
        await stores.close()
    await end_leftovers()


def tune_collector() -> None:
    """Tells the garbage collector what a pod is like, once all modules and graphs are loaded.

    What is there stays, so it need not be looked at again and again, which stops a pod for a tenth of a second each time;
    and a turn leaves few cycles, so there is no hurry to look for them. `scripts/bench flood` shows it in its p99.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


async def end_leftovers() -> None:
    """Ends what graphs have left behind: a node that swallows its cancellation, or blocks a thread, must not keep the
    process. All that had to end in order has ended by now."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    threads = asyncio.create_task(asyncio.get_running_loop().shutdown_default_executor())
    _, stuck = await asyncio.wait({*left, threads}, timeout=1)
    if stuck:
        sys.stderr.flush()
        os._exit(0)


async def serve_pod(pod: Pod) -> None:
    """Serves a pod until SIGTERM or SIGINT. Raises ServerError when it cannot listen.

    SIGTERM gives notice first: not ready any more, but everything is answered, until the balancer has noticed. SIGINT and
    any second signal end the notice. Then the pod stops to accept and drains.
    """
    settings = pod.settings
    config = uvicorn.Config(
        pod.app,
        host=settings.host,
        port=settings.port,
        http=http_protocol(),
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        # What a proxy says is judged by gateway/proxies.py, which lets nothing through that is no address.
        proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE_S,
        timeout_graceful_shutdown=int(settings.drain_s) + 2,
    )
    server = QuietServer(config)
    leaving: list[asyncio.Task[None]] = []
    notice_over = asyncio.Event()

    async def leave() -> None:
        pod.announce_drain()
        # Connections that are kept alive would lead back here, past every balancer.
        config.encoded_headers.append((b"connection", b"close"))
        with suppress(TimeoutError):
            await asyncio.wait_for(notice_over.wait(), settings.drain_notice_s)
        server.should_exit = True
        await pod.drain()

    def on_sigterm() -> None:
        if leaving:
            notice_over.set()
        else:
            leaving.append(asyncio.create_task(leave()))

    def on_sigint() -> None:
        notice_over.set()
        on_sigterm()

    on_signals(on_sigterm, signal.SIGTERM)
    on_signals(on_sigint, signal.SIGINT)
    try:
        await server.serve()
    except SystemExit as error:
        # uvicorn logs why and exits; the usual reason is the port.
        raise ServerError(f"cannot listen on {settings.host}:{settings.port}") from error


def on_signals(stop: Callable[[], None], *numbers: signal.Signals) -> None:
    """Calls `stop` on these signals; without any named, on SIGTERM and SIGINT."""
    loop = asyncio.get_running_loop()
    for number in numbers or (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)


async def _worker(options: argparse.Namespace) -> None:
    settings = _settings(*STORES)
    stores = Stores(settings)
    try:
        worker = await build_worker(settings, stores)
        await warn_if_not_migrated(stores.postgres)
        on_signals(worker.stop)
        tune_collector()
        await worker.run()
        await worker.drain(settings.drain_s)
    finally:
        await stores.close()


async def _migrate(options: argparse.Namespace) -> None:
    settings = _settings("database_url")
    postgres = Postgres(settings.database_url, timeout_s=30)
    try:
        applied = await migrate(postgres, load_migrations())
    finally:
        await postgres.close()
    for migration in applied:
        print(f"applied {migration.number:04d}_{migration.name}")
    if not applied:
        print("nothing to apply")


async def _dev(options: argparse.Namespace) -> None:
    settings = load_settings(os.environ)
    configure_logs(settings.log_format, "warning" if settings.log_level == "info" else settings.log_level)
    dev = DevOptions(port=options.port, data=options.data, worker=not options.no_worker)
    await run_dev(dev, os.environ, serve_pod, on_signals)


async def _agents_put(options: argparse.Namespace) -> None:
    raw = options.definition.read() if options.definition else b"{}"
    try:
        fields = msgspec.json.decode(raw, type=dict[str, Any])
        if options.graph:
            fields["graph"] = options.graph
        definition = msgspec.convert(fields, AgentDefinition)
    except msgspec.DecodeError as error:
        raise SettingsError(f"definition: {error}") from error
    except msgspec.ValidationError as error:
        raise SettingsError(f"definition: {error}") from error
    stores = Stores(_settings(*STORES))
    try:
        agent, created = await put_audited(stores.agents, options.name, definition, at_the_command_line())
    finally:
        await stores.close()
    print(f"{'created' if created else 'replaced'} {agent.name} {agent.id}")


async def _agents_show(options: argparse.Namespace) -> None:
    stores = Stores(_settings(*STORES))
    try:
        agent = await stores.agents.load(options.name)
    finally:
        await stores.close()
    print(json.dumps(msgspec.to_builtins(view(agent)), indent=2))


async def _agents_list(options: argparse.Namespace) -> None:
    stores = Stores(_settings(*STORES))
    try:
        agents = await stores.agents.list()
    finally:
        await stores.close()
    for agent in agents:
        state = "active" if agent.definition.active else "off"
        print(f"{agent.id}  {agent.name:<24} {agent.definition.graph:<16} {state}")


async def _agents_delete(options: argparse.Namespace) -> None:
    stores = Stores(_settings(*STORES))
    try:
        with audited("agent_deleted", at_the_command_line()) as facts:
            facts["agent"] = (await stores.agents.delete(options.name)).id
    finally:
        await stores.close()
    print(f"deleted {options.name}")


async def _dead(options: argparse.Namespace) -> None:
    stores = Stores(_settings(*STORES))
    try:
        letters = await stores.outbox.dead_letters()
        for letter in letters:
            retried = options.retry and await _retry(stores, letter)
            fact = letter.fact if is_fact(letter.fact) else "unreadable"
            print(f"{letter.entry}  {fact:<12} {letter.died_at}  {'retried' if retried else letter.reason}")
    finally:
        await stores.close()
    if not letters:
        print("no dead letters")


async def _retry(stores: Stores, letter: DeadLetter) -> bool:
    who, session = at_the_command_line(), masked(letter.session_id)
    with audited("dead_letter_retried", who, entry=letter.entry, partition=letter.partition, session=session) as facts:
        queued = await stores.outbox.retry_dead(letter)
        facts["queued"] = queued
    return queued
