"""Loads the built-in graphs and those of the operator's langgraph.json."""

import asyncio
import importlib.util
import inspect
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import structlog
from langgraph.graph import StateGraph
from langgraph.pregel import Pregel

from gateway.graphs.echo import check_echo, echo_graph
from gateway.graphs.exits import contain_exits
from gateway.graphs.graphs import CheckConfig, Graphs

log = structlog.get_logger()

BUILT_IN = ("chat", "echo")


class GraphError(Exception):
    """A graph of langgraph.json cannot be loaded; the message names it and says why."""


async def load_graphs(file: Path | None, base_urls: Sequence[str] = ()) -> Graphs:
    """The built-in graphs and those of the operator's langgraph.json (None: none). Raises GraphError.

    `base_urls` are the endpoints that agents on the graph `chat` may name; that graph needs the extra `llm`.
    """
    graphs = {"echo": echo_graph()}
    checks: dict[str, CheckConfig] = {"echo": check_echo}
    if importlib.util.find_spec("langchain") is not None:
        # Not imported above: its packages are optional.
        chat = importlib.import_module("gateway.graphs.chat").ChatGraph(base_urls)
        graphs["chat"], checks["chat"] = chat.compile(), chat.check
    contain_exits(asyncio.get_running_loop())
    entries: dict[str, Any] = {}
    if file is not None:
        entries, dependencies = _read_project(file)
        _add_to_path(file.parent, dependencies)
        for name, reference in entries.items():
            if isinstance(reference, dict):
                reference = reference.get("path", "")  # noqa: PLW2901
            graphs[name] = await _load_graph(name, str(reference), file.parent)
    return Graphs(graphs, {name: check for name, check in checks.items() if name not in entries})


def graph_names(file: Path) -> set[str]:
    """The graphs that agents may name beside this langgraph.json; no graph is imported. Raises GraphError."""
    return {*BUILT_IN, *_read_project(file)[0]}


def _read_project(file: Path) -> tuple[dict[str, Any], list[str]]:
    """The graphs and the dependencies of a langgraph.json.

    LangGraph's own format: `{"graphs": {"<name>": "<./file.py or module>:<variable>"}, "dependencies": ["."]}`.
    """
    try:
        project = json.loads(file.read_text())
        return dict(project["graphs"]), [str(entry) for entry in project.get("dependencies", ["."])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise GraphError(f"{file}: not a langgraph.json with `graphs`: {type(error).__name__}: {error}") from error


def _add_to_path(root: Path, dependencies: list[str]) -> None:
    folders = [root, *((root / entry).resolve() for entry in dependencies if str(entry).startswith("."))]
    for folder in folders:
        if str(folder) not in sys.path:
            sys.path.append(str(folder))


async def _load_graph(name: str, reference: str, root: Path) -> Pregel[Any, Any, Any, Any]:
    where, _, variable = reference.rpartition(":")
    if not where or not variable:
        raise GraphError(f"graph {name}: {reference!r} is not <file.py or module>:<variable>")
    try:
        found = getattr(_load_module(name, where, root), variable)
        if not isinstance(found, (Pregel, StateGraph)) and callable(found):
            found = found({"configurable": {}}) if _wants_config(found) else found()
        if inspect.isawaitable(found):
            found = await found
        if isinstance(found, StateGraph):
            found = found.compile()
    except (Exception, SystemExit) as error:
        # Importing an operator's code can raise anything.
        raise GraphError(f"graph {name} ({reference}): {type(error).__name__}: {error}") from error
    if not isinstance(found, Pregel):
        raise GraphError(f"graph {name} ({reference}) is {type(found).__name__}, not a graph")
    if found.checkpointer:
        log.warning("graph.checkpointer_left_out", graph=name, reason="the gateway keeps the session")
        found = found.copy({"checkpointer": None})
    return found


def _wants_config(factory: Any) -> bool:
    return bool(inspect.signature(factory).parameters)


def _load_module(name: str, where: str, root: Path) -> Any:
    if not where.endswith(".py"):
        return importlib.import_module(where)
    module_name = f"gateway_graph_{name}"
    spec = importlib.util.spec_from_file_location(module_name, (root / where).resolve())
    if spec is None or spec.loader is None:
        raise GraphError(f"graph {name}: cannot load {where}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[module_name] = module
    spec.loader.exec_module(module)
    return module
