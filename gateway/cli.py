"""The command line: what each command takes, and the commands that run processes. The others are in `gateway/commands`."""

import argparse
import asyncio
import importlib
import os
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import uvloop

from gateway.app import build_pod, build_worker, warn_if_not_migrated
from gateway.commands import agents
from gateway.commands.dead_letters import dead_letters
from gateway.commands.doctor import doctor
from gateway.commands.environment import STORES, CommandError, command_settings, open_stores
from gateway.commands.settings import print_settings
from gateway.graphs.loading import GraphError
from gateway.logs import configure_logs, contain_errors
from gateway.problems import Problem
from gateway.server.serve import CannotListen, end_leftovers, on_signals, serve_pod, tune_collector
from gateway.settings import SettingsError, load_settings
from persistence.errors import PersistenceError
from persistence.postgres.migrate import load_migrations, migrate
from persistence.postgres.postgres import Postgres

ERRORS = (CommandError, SettingsError, PersistenceError, GraphError, CannotListen, Problem)
"""The errors whose text is a sentence for the user."""


def main(arguments: Sequence[str]) -> int:
    """Runs a command; its exit status."""
    options = _parser().parse_args(arguments)
    contain_errors()
    try:
        command: Callable[[argparse.Namespace], Coroutine[Any, Any, None]] = options.command
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(command(options))
        sys.stdout.flush()
    except BrokenPipeError:
        # The reader of the output has gone, as `head` does: nothing more is written (Python documentation, SIGPIPE).
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except ERRORS as error:
        print(f"gateway: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gateway",
        description="The session gateway: chat sessions between websites and LangGraph agents.",
        epilog="Settings are environment variables: `gateway settings` prints them all.",
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    serve = _add(commands, "serve", _serve, "run a pod: the HTTP server")
    serve.epilog = "SIGTERM drains it: /readyz fails at once, running turns end, then the process."
    worker = _add(commands, "worker", _worker, "run a worker: it writes records from Redis to Postgres")
    worker.epilog = "SIGTERM lets it write its backlog first, for GATEWAY_DRAIN_S at most."
    _add(commands, "migrate", _migrate, "apply the database migrations that are missing")
    dev = _add(commands, "dev", _dev, "run everything on this machine, Redis and Postgres included")
    dev.add_argument("--port", type=int, default=8000, help="port of the gateway (default: 8000)")
    dev.add_argument("--data", type=Path, default=Path(".gateway"), help="folder for all data (default: .gateway)")
    dev.add_argument("--no-worker", action="store_true", help="start no worker, so that nothing reaches Postgres")
    _add_agents(commands)
    dead = _add(commands, "dead", dead_letters, "list dead letters, the records that Postgres refused")
    dead.add_argument("--retry", action="store_true", help="put each back on the outbox")
    check = _add(commands, "doctor", doctor, "check Redis and Postgres, and say what to do about what is wrong")
    check.add_argument("--json", action="store_true", help="print JSON, for programs")
    check.epilog = "The exit status is 1 if something is wrong. What is only weak works, and promises less."
    settings = _add(commands, "settings", print_settings, "print all settings, and what the environment sets")
    settings.add_argument("--json", action="store_true", help="print JSON, for programs")
    settings.epilog = "Secrets are never printed. The exit status is 1 if the environment has a wrong setting."
    return parser


def _add_agents(commands: Any) -> None:
    text = "put, edit, show, list and delete agents"
    parser = commands.add_parser("agents", help=text, description=f"{text.capitalize()}.")
    actions = parser.add_subparsers(required=True, metavar="action")
    put = _add(actions, "put", agents.put, "create an agent, or change the fields of one that are named")
    put.add_argument("name", help="name of the agent, or UUID of one that exists")
    put.add_argument("--graph", help="graph that answers: built-in, or of your langgraph.json")
    put.add_argument(
        "--definition",
        type=argparse.FileType("rb"),
        metavar="FILE",
        help="file with fields as JSON, - for stdin; such as `agents show` prints",
    )
    put.add_argument("--replace", action="store_true", help="give the fields that are not named their defaults")
    put.epilog = (
        "Fields merge (RFC 7396): those not named stay, objects such as config merge, lists are replaced; null sets a limit "
        "or retention_days to none and any other field to its default. Prints what changed."
    )
    edit = _add(actions, "edit", agents.edit, "edit an agent as JSON in $VISUAL, $EDITOR or vi")
    edit.add_argument("name", help="name or UUID")
    edit.epilog = (
        "A field that you remove takes its default. Site keys are shown as fingerprints, which stand for the keys they are "
        "of. Nothing is saved if somebody else has changed the agent meanwhile."
    )
    show = _add(actions, "show", agents.show, "print an agent as JSON")
    show.add_argument("name", help="name or UUID")
    _add(actions, "list", agents.list_agents, "list agents: UUID, name, graph, active or off")
    delete = _add(actions, "delete", agents.delete, "delete an agent; its sessions stay")
    delete.add_argument("name", help="name or UUID")


def _add(commands: Any, name: str, command: Any, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=help_text, description=f"{help_text[0].upper()}{help_text[1:]}."
    )
    parser.set_defaults(command=command)
    return parser


async def _serve(options: argparse.Namespace) -> None:
    settings = command_settings(*STORES, "secret_key", "admin_key")
    async with open_stores(settings) as stores:
        pod = await build_pod(settings, stores)
        await warn_if_not_migrated(stores.postgres)
        tune_collector()
        await serve_pod(pod)
    await end_leftovers()


async def _worker(options: argparse.Namespace) -> None:
    settings = command_settings(*STORES)
    async with open_stores(settings, of_worker=True) as stores:
        worker = await build_worker(settings, stores)
        await warn_if_not_migrated(stores.postgres)
        on_signals(worker.stop)
        tune_collector()
        await worker.run()
        await worker.drain(settings.drain_s)


async def _migrate(options: argparse.Namespace) -> None:
    settings = command_settings("database_url")
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
    # Imported here alone: what runs in production shall not contain the servers of development.
    dev = importlib.import_module("gateway.dev.run")
    try:
        await dev.run_dev(dev.DevOptions(options.port, options.data, worker=not options.no_worker), os.environ)
    except dev.ServerError as error:
        raise CommandError(str(error)) from error
