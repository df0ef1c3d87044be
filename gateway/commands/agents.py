"""`gateway agents`: put, edit, show, list and delete agents."""

import argparse
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from gateway.access.audit import command_line_operator
from gateway.access.tokens import fingerprint
from gateway.agents import Document, Written, differences, document_of, merge_patch, read_definition
from gateway.api.reading import check_text
from gateway.commands.environment import STORES, CommandError, command_settings, open_stores
from gateway.graphs.loading import graph_names
from gateway.problems import InvalidField, Problem
from persistence.errors import PersistenceError
from persistence.model.agents import AgentDefinition

SHOWN_CHARS = 60
SECRET_NAME = re.compile(r"(key|token|secret|password|credential)s?$", re.IGNORECASE)


async def put(options: argparse.Namespace) -> None:
    """Creates an agent, or changes the fields of an agent that are named."""
    named = _decode(options.definition.read()) if options.definition else {}
    if options.graph:
        named["graph"] = options.graph
    settings = command_settings(*STORES)

    def change(stored: Document | None) -> Document:
        return named if options.replace else merge_patch(stored or {}, named)

    async with open_stores(settings) as stores:
        check = partial(_check_graph, settings.graphs)
        written = await stores.agents.write(options.name, change, command_line_operator(), check=check)
    print("\n".join(_outcome(written)))


async def edit(options: argparse.Namespace) -> None:
    """Opens an agent in the user's editor and saves it, unless somebody else has changed it meanwhile."""
    settings = command_settings(*STORES)
    check = partial(_check_graph, settings.graphs)
    # The stores are closed while the user edits: an idle connection may not live that long.
    async with open_stores(settings) as stores:
        agent = await stores.agents.load_stored(options.name)
    opened = document_of(agent)

    def read(text: bytes) -> Document:
        document = _decode(text)
        check(read_definition(document, agent.name, agent), agent.definition)
        return document

    def unless_changed(stored: Document | None) -> Document:
        if stored != opened:
            raise CommandError(f"{agent.name} was {'changed' if stored else 'deleted'} meanwhile: nothing is saved")
        return edited

    draft = _write_draft(opened)
    try:
        edited = _edit_until_valid(draft, read)
        try:
            async with open_stores(settings) as stores:
                written = await stores.agents.write(agent.id, unless_changed, command_line_operator(), check=check)
        except (CommandError, PersistenceError, Problem) as error:
            kept = draft.rename(draft.with_suffix(".kept.json"))
            raise CommandError(f"{error}; your edit is in {kept}") from error
    finally:
        draft.unlink(missing_ok=True)
    print("\n".join(_outcome(written)))


async def show(options: argparse.Namespace) -> None:
    """Prints an agent as JSON, which `put --definition` and `PUT /api/agents/{agent_id}` take back."""
    async with open_stores() as stores:
        agent = await stores.agents.load(options.name)
    print(json.dumps(document_of(agent), indent=2))


async def list_agents(options: argparse.Namespace) -> None:
    """Prints a line for each agent."""
    async with open_stores() as stores:
        agents = await stores.agents.list()
    for agent in agents:
        state = "active" if agent.definition.active else "off"
        print(f"{agent.id}  {agent.name:<24} {agent.definition.graph:<16} {state}")


async def delete(options: argparse.Namespace) -> None:
    """Deletes an agent."""
    async with open_stores() as stores:
        agent = await stores.agents.delete(options.name, command_line_operator())
    print(f"deleted {agent.name}")


def _decode(text: bytes) -> Document:
    try:
        document = msgspec.json.decode(text, type=Document)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidField(f"definition: {error}", field="definition") from error
    for name, value in document.items():
        check_text(value, name)
    return document


def _check_graph(langgraph_json: str, definition: AgentDefinition, stored: AgentDefinition | None) -> None:
    """Refuses a new graph that is not in the operator's langgraph.json. Without one, pods may have graphs that this machine
    does not know, so every name is accepted."""
    if langgraph_json and (stored is None or definition.graph != stored.graph):
        names = graph_names(Path(langgraph_json))
        if definition.graph not in names:
            raise InvalidField(f"graph: not one of this server's graphs: {', '.join(sorted(names))}", field="graph")


# --------------------------------------------------------------------------------------------------------------- editing


def _write_draft(document: Document) -> Path:
    """A new file that the user alone can read: a config may hold secrets."""
    handle, name = tempfile.mkstemp(prefix=f"gateway-{document['name']}-", suffix=".json")
    with open(handle, "w") as file:
        file.write(json.dumps(document, indent=2, ensure_ascii=False) + "\n")
    return Path(name)


def _edit_until_valid(draft: Path, read: Callable[[bytes], Document]) -> Document:
    """The document in the draft once `read` takes it. Raises CommandError when the user gives up."""
    while True:
        _run_editor(draft)
        try:
            return read(draft.read_bytes())
        except InvalidField as error:
            print(f"gateway: {error}", file=sys.stderr)
        try:
            again = input("Edit again? [Y/n] ")
        except EOFError:
            again = "n"
        if again.strip().lower() not in ("", "y", "yes"):
            raise CommandError("nothing is saved")


def _run_editor(draft: Path) -> None:
    """Runs $VISUAL, $EDITOR or vi on a file. Ctrl-C belongs to the editor meanwhile."""
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    try:
        editor = subprocess.Popen([*shlex.split(command), str(draft)])  # noqa: S603
    except (OSError, ValueError) as error:
        raise CommandError(f"the editor cannot be run: {command}; set VISUAL or EDITOR") from error
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        status = editor.wait()
    finally:
        signal.signal(signal.SIGINT, handler)
    if status != 0:
        raise CommandError(f"the editor ended with status {status}: nothing is saved")


# -------------------------------------------------------------------------------------------------------------- printing


def _outcome(written: Written) -> Iterator[str]:
    """What a write did, in lines: a line for each field that changed."""
    agent, before = written
    if before is None:
        yield f"created {agent.name} {agent.id}"
        return
    found = differences(document_of(before), document_of(agent))
    yield f"{'changed' if found else 'nothing changed:'} {agent.name} {agent.id}"
    for difference in found:
        old, new = (_as_text(difference.field, value) for value in difference[1:])
        start = _start_of_excerpts(old, new)
        yield f"  {difference.field}: {_excerpt(old, start)} -> {_excerpt(new, start)}"


def _as_text(field: str, value: Any) -> str:
    if value is msgspec.UNSET:
        return "(none)"
    path, _, name = field.rpartition(".")
    if path.startswith("config") or name == "config":
        value = _without_secrets(name, value)
    return json.dumps(value, ensure_ascii=False)


def _without_secrets(name: str, value: Any) -> Any:
    """A value of a config with fingerprints in place of the texts whose names say that they are secret."""
    match value:
        case str() if SECRET_NAME.search(name):
            return fingerprint(value)
        case dict():
            return {inner: _without_secrets(inner, item) for inner, item in value.items()}
        case list():
            return [_without_secrets(name, item) for item in value]
        case _:
            return value


def _start_of_excerpts(old: str, new: str) -> int:
    """Of long texts: a little before the first character that differs."""
    if max(len(old), len(new)) <= SHOWN_CHARS:
        return 0
    same = next((at for at, (one, other) in enumerate(zip(old, new, strict=False)) if one != other), min(len(old), len(new)))
    return max(0, same - 20)


def _excerpt(text: str, start: int) -> str:
    end = start + SHOWN_CHARS
    return f"{'…' if start else ''}{text[start:end]}{'…' if end < len(text) else ''}"
