"""LangGraph: the operator's graphs, compiled once per process, and one call of a graph for one turn.

The only module that knows langgraph. It is handed what the Redis layer gave and hands back what is to be stored; it
holds no session state, and graphs keep none of their own: a checkpointer of theirs is left out.
"""

import asyncio
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TypedDict

import msgspec
import structlog
from langchain_core.messages import AIMessage, AnyMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.runnables import RunnableConfig
from langgraph.graph import StateGraph
from langgraph.pregel import Pregel

from gateway.problems import GraphFailed, GraphInvalidOutput, GraphNotConfigured
from gateway.turns import GraphInput, GraphOutput, TurnRequest, TurnResult, Turns
from persistence.agents import Agent
from persistence.records import Message

log = structlog.get_logger()

_OWN_STATE = ("user_input", "context", "metadata", "session_id", "channel")


class GraphError(Exception):
    """A graph of langgraph.json cannot be loaded; the message names it and says why."""


class EchoState(TypedDict, total=False):
    """The part of the state that the built-in `echo` uses."""

    messages: list[AnyMessage]
    user_input: str
    agent_response: str
    metadata: dict[str, Any]


async def _echo(state: EchoState, config: RunnableConfig) -> EchoState:
    settings = config.get("configurable", {})
    delay_s = float(settings.get("delay_ms", 0)) / 1000
    if delay_s > 0:
        await asyncio.sleep(delay_s)
    return {
        "agent_response": f"You said: {state['user_input']}",
        "metadata": {"history": len(state["messages"]) - 1},
    }


def echo_graph() -> Pregel[Any, Any, Any, Any]:
    """The built-in graph without a model, for demos and tests. Its config's `delay_ms` makes it slow."""
    graph = StateGraph(EchoState)
    graph.add_node("echo", _echo)
    graph.set_entry_point("echo")
    return graph.compile()


BUILT_IN = {"echo": echo_graph}


class Graphs:
    """Compiled graphs by name."""

    def __init__(self, graphs: Mapping[str, Pregel[Any, Any, Any, Any]]) -> None:
        self._graphs = dict(graphs)

    @property
    def names(self) -> list[str]:
        return sorted(self._graphs)

    async def run(self, agent: Agent, graph_input: GraphInput) -> GraphOutput:
        """Runs the agent's graph once. Raises GraphNotConfigured, GraphFailed, GraphInvalidOutput."""
        graph = self._graphs.get(agent.definition.graph)
        if graph is None:
            raise GraphNotConfigured(f"graph: {agent.definition.graph}")
        history = [_to_langchain(message) for message in graph_input.history]
        state: Any = {
            "messages": [*history, HumanMessage(graph_input.user_input, id=graph_input.message_uuid)],
            "user_input": graph_input.user_input,
            "agent_response": "",
            "context": graph_input.context,
            "metadata": graph_input.metadata,
            "session_id": graph_input.session_id,
            "channel": graph_input.channel,
            "next_action": "",
        }
        config: RunnableConfig = {
            "configurable": {
                **agent.definition.config,
                "thread_id": graph_input.session_id,
                "session_id": graph_input.session_id,
                "agent_id": agent.id,
                "channel": graph_input.channel,
            }
        }
        context = agent.definition.config if graph.context_schema is not None else None
        try:
            output = await graph.ainvoke(state, config, context=context)
        except (Exception, SystemExit) as error:
            # Whatever a graph raises ends its turn and nothing else; what it says may hold a visitor's words.
            log.exception("graph.failed", graph=agent.definition.graph, error=type(error).__name__)
            raise GraphFailed from error
        return _output(output, graph_input, {message.id for message in history} | {graph_input.message_uuid})


def _to_langchain(message: Message) -> BaseMessage:
    match message.role:
        case "user":
            return HumanMessage(message.content, id=message.id)
        case "assistant":
            return AIMessage(message.content, id=message.id)
        case "system":
            return SystemMessage(message.content, id=message.id)


def _output(output: Any, graph_input: GraphInput, given: set[str | None]) -> GraphOutput:
    """What a turn needs of a graph's final state, checked."""
    if not isinstance(output, dict):
        raise GraphInvalidOutput(f"the graph's state is {type(output).__name__}, not a dict")
    messages = output.get("messages")
    answers = [
        message
        for message in (messages if isinstance(messages, list) else [])
        if isinstance(message, AIMessage) and message.id not in given
    ]
    text = output.get("agent_response")
    if text is None or text == "":
        if not answers:
            raise GraphInvalidOutput("the graph set no agent_response and added no AI message")
        text = str(answers[-1].text)
    if not isinstance(text, str):
        raise GraphInvalidOutput(f"agent_response is {type(text).__name__}, not str")
    context = _object(output, "context")
    metadata = _object(output, "metadata")
    return GraphOutput(
        response=text,
        context=None if context is None or context == graph_input.context else context,
        # A graph that leaves the visitor's metadata as they are has returned none.
        metadata={} if metadata is None or metadata == graph_input.metadata else metadata,
        tokens_used=_tokens(answers),
        model_used=_model(answers),
    )


def _object(output: dict[str, Any], name: str) -> dict[str, Any] | None:
    value = output.get(name)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise GraphInvalidOutput(f"{name} is {type(value).__name__}, not a dict")
    try:
        # As it will be read again: what JSON cannot hold is found here, before anything is stored.
        return msgspec.json.decode(msgspec.json.encode(value), type=dict[str, Any])
    except (TypeError, ValueError, RecursionError) as error:
        raise GraphInvalidOutput(f"{name} cannot be stored as JSON: {type(error).__name__}") from error


def _tokens(answers: list[AIMessage]) -> int | None:
    used = [message.usage_metadata["total_tokens"] for message in answers if message.usage_metadata]
    return sum(used) if used else None


def _model(answers: list[AIMessage]) -> str | None:
    for message in reversed(answers):
        name = message.response_metadata.get("model_name") or message.response_metadata.get("model")
        if name:
            return str(name)
    return None


async def load_graphs(file: Path | None) -> Graphs:
    """The built-in graphs and those of the operator's langgraph.json (None: none). Raises GraphError.

    The file is LangGraph's own: `{"graphs": {"<name>": "<./file.py or module>:<variable>"}, "dependencies": ["."]}`.
    """
    graphs = {name: make() for name, make in BUILT_IN.items()}
    if file is not None:
        try:
            project = json.loads(file.read_text())
            entries = dict(project["graphs"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GraphError(f"{file}: not a langgraph.json with `graphs`: {type(error).__name__}: {error}") from error
        _add_to_path(file.parent, project.get("dependencies", ["."]))
        for name, reference in entries.items():
            if isinstance(reference, dict):
                reference = reference.get("path", "")  # noqa: PLW2901
            graphs[name] = await _load_graph(name, str(reference), file.parent)
    return Graphs(graphs)


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
    except Exception as error:
        # Importing an operator's code can raise anything; the start stops with its name.
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


class FindsAgents(Protocol):
    """What the runtime needs of the agents."""

    async def load(self, reference: str) -> Agent: ...


class AgentRuntime:
    """Answers visitors' messages: what the HTTP layer calls, and a Python API for everybody else."""

    def __init__(self, agents: FindsAgents, turns: Turns) -> None:
        self._agents = agents
        self._turns = turns

    async def execute_text(
        self, agent_id: str, user_input: str, session_id: str, metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One text message to an agent (UUID or name); the session is created if there is none.

        Returns {"response": str, "metadata": dict}. Raises a Problem.
        """
        metadata = metadata or {}
        agent = await self._agents.load(agent_id)
        request = TurnRequest(
            session_id=session_id,
            message=user_input,
            metadata=metadata,
            website_domain=str(metadata.get("website_domain", "")),
            user_agent=str(metadata.get("user_agent", "")),
        )
        result = await self.execute(agent, request)
        return {"response": result.response, "metadata": result.metadata}

    async def execute(self, agent: Agent, request: TurnRequest) -> TurnResult:
        """One turn of an agent. Raises a Problem."""
        return await self._turns.execute(agent, request)
