"""The command line: `serve`, `worker`, `migrate`, `agents`, `dev`."""

import argparse
import asyncio
import json
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import uvloop

from gateway.access.audit import at_the_command_line, audited
from gateway.api.agents import put_audited, view
from gateway.app import Stores, build_pod, build_worker, warn_if_not_migrated
from gateway.dev.run import DevOptions, run_dev
from gateway.dev.servers.ports import ServerError
from gateway.graphs.loading import GraphError
from gateway.logs import configure_logs, contain_errors
from gateway.problems import Problem
from gateway.server.serve import CannotListen, end_leftovers, on_signals, serve_pod, tune_collector
from gateway.settings import Settings, SettingsError, load_settings
from persistence.errors import PersistenceError
from persistence.model.agents import AgentDefinition
from persistence.model.codec import is_fact
from persistence.model.ids import masked
from persistence.postgres.migrate import load_migrations, migrate
from persistence.postgres.postgres import Postgres
from persistence.redis.outbox import DeadLetter

STORES = ("redis_url", "database_url")


def main(arguments: Sequence[str]) -> int:
    """Runs a command; its exit status."""
    options = _parser().parse_args(arguments)
    contain_errors()
    try:
        command: Callable[[argparse.Namespace], Coroutine[Any, Any, None]] = options.command
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(command(options))
    except (SettingsError, PersistenceError, GraphError, ServerError, CannotListen, Problem) as error:
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
    await run_dev(dev, os.environ)


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
