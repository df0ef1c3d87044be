"""LangGraph: the operator's graphs, compiled once per process, and one call of a graph for one turn.

The only module that knows langgraph. It is handed what the Redis layer gave and hands back what is to be stored; it
holds no session state, and graphs keep none of their own: a checkpointer of theirs is left out.
"""

import asyncio
import copy
import importlib
import importlib.util
import inspect
import json
import sys
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping, Sequence
from contextvars import ContextVar
from operator import is_
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Protocol, TypedDict

import msgspec
import structlog
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, AnyMessage, BaseMessage, HumanMessage, SystemMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_core.runnables import RunnableConfig
from langgraph.channels import BinaryOperatorAggregate
from langgraph.graph import StateGraph
from langgraph.graph.message import add_messages
from langgraph.pregel import Pregel
from langgraph.types import Overwrite, StreamMode
from pydantic import BaseModel

from gateway.domains import normal_domain
from gateway.logs import frames
from gateway.problems import AgentInactive, GraphFailed, GraphInvalidOutput, GraphNotConfigured, InvalidField
from gateway.streams import TurnLog
from gateway.turns import (
    Admission,
    Attached,
    Emit,
    GraphInput,
    GraphOutput,
    SessionId,
    TurnRequest,
    TurnResult,
    Turns,
    storable_json,
    storable_text,
    storable_value,
)
from persistence.agents import Agent, AgentDefinition
from persistence.sessions import Access

log = structlog.get_logger()


_in_graph: ContextVar[bool] = ContextVar("in_graph", default=False)


def _contain_exits(loop: asyncio.AbstractEventLoop) -> None:
    """Keeps a graph's SystemExit from ending the pod: LangGraph runs nodes as tasks, and asyncio raises it from those."""

    def make_task(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any) -> "asyncio.Task[Any]":
        return asyncio.Task(_contained(work) if _in_graph.get() else work, loop=loop, **options)

    loop.set_task_factory(make_task)  # type: ignore[arg-type]  # the stub wants it generic


async def _contained(work: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await work
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"the graph raised {type(error).__name__}") from error


class GraphError(Exception):
    """A graph of langgraph.json cannot be loaded; the message names it and says why."""


class EchoState(TypedDict, total=False):
    """The part of the state that the built-in `echo` uses."""

    messages: list[AnyMessage]
    user_input: str
    agent_response: str
    metadata: dict[str, Any]


class EchoModel(BaseChatModel):
    """A chat model that says what it was told, in `chunks` pieces over `delay_s`."""

    chunks: int
    delay_s: float

    @property
    def _llm_type(self) -> str:
        return "echo"

    def _generate(self, messages: list[BaseMessage], *arguments: Any, **options: Any) -> ChatResult:
        return ChatResult(generations=[ChatGeneration(message=AIMessage(str(messages[-1].text)))])

    async def _astream(
        self, messages: list[BaseMessage], *arguments: Any, **options: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        text = str(messages[-1].text)
        for i in range(self.chunks):
            await asyncio.sleep(self.delay_s / self.chunks)
            piece = text[len(text) * i // self.chunks : len(text) * (i + 1) // self.chunks]
            yield ChatGenerationChunk(message=AIMessageChunk(content=piece))


class EchoConfig(msgspec.Struct):
    """The config of an agent on the graph `echo`: how long an answer takes, and in how many pieces it streams."""

    delay_ms: Annotated[float, msgspec.Meta(ge=0, le=3_600_000)] = 0
    chunks: Annotated[int, msgspec.Meta(ge=1, le=100_000)] = 1


async def _echo(state: EchoState, config: RunnableConfig) -> EchoState:
    settings = msgspec.convert(config.get("configurable", {}), EchoConfig)
    text = f"You said: {state['user_input']}"
    if settings.chunks > 1:
        model = EchoModel(chunks=settings.chunks, delay_s=settings.delay_ms / 1000)
        text = str((await model.ainvoke([AIMessage(text)])).text)
    elif settings.delay_ms:
        await asyncio.sleep(settings.delay_ms / 1000)
    return {"agent_response": text, "metadata": {"history": len(state["messages"]) - 1}}


def echo_graph() -> Pregel[Any, Any, Any, Any]:
    """The built-in graph without a model, for demos and tests. Its config makes it slow, and stream."""
    graph = StateGraph(EchoState)
    graph.add_node("echo", _echo)
    graph.set_entry_point("echo")
    return graph.compile()


def _check_echo(config: dict[str, Any]) -> None:
    msgspec.convert(config, EchoConfig)


CheckConfig = Callable[[dict[str, Any]], Any]


class Graphs:
    """Compiled graphs by name; `checks` are those of the configs that built-in graphs take."""

    def __init__(
        self, graphs: Mapping[str, Pregel[Any, Any, Any, Any]], checks: Mapping[str, CheckConfig] = MappingProxyType({})
    ) -> None:
        self._graphs = dict(graphs)
        # Their reducer would look for each message, by its id, among those before it, and come to the list it was given.
        self._take_lists = {name for name, graph in graphs.items() if _adds_messages(graph)}
        self._checks = checks

    @property
    def names(self) -> list[str]:
        return sorted(self._graphs)

    def check(self, definition: AgentDefinition) -> None:
        """Raises InvalidField when a definition's graph, or its config, is not one that this server can run."""
        if definition.graph not in self._graphs:
            raise InvalidField(f"graph: not one of this server's graphs: {', '.join(self.names)}", field="graph")
        check = self._checks.get(definition.graph)
        if check is not None:
            try:
                check(definition.config)
            except ValueError as error:
                raise InvalidField(f"config: {error}", field="config") from error

    async def run(self, agent: Agent, graph_input: GraphInput, emit: Emit | None = None) -> GraphOutput:
        """Runs the agent's graph once; with `emit`, hands on what it streams.

        Raises GraphNotConfigured, GraphFailed, GraphInvalidOutput.
        """
        graph = self._graphs.get(agent.definition.graph)
        if graph is None:
            raise GraphNotConfigured(f"graph: {agent.definition.graph}")
        given = [_TO_LANGCHAIN[message.role](message.content, message.id) for message in graph_input.history]
        given.append(_TO_LANGCHAIN["user"](graph_input.user_input, graph_input.message_uuid))
        # Copies: what a graph changes in place is compared with what it was given.
        messages: Any = given.copy()
        given_context, given_metadata = copy.deepcopy((graph_input.context, graph_input.metadata))
        state: Any = {
            "messages": Overwrite(messages) if agent.definition.graph in self._take_lists else messages,
            "user_input": graph_input.user_input,
            "agent_response": "",
            "context": given_context,
            "metadata": given_metadata,
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
        _in_graph.set(True)
        try:
            output = await _run(graph, state, config, context, emit)
        except (asyncio.CancelledError, GraphInvalidOutput):
            raise
        except BaseException as error:
            # Whatever a graph raises ends its turn and nothing else; what it says may hold a visitor's words.
            log.error("graph.failed", graph=agent.definition.graph, error=type(error).__name__, frames=frames(error))
            raise GraphFailed from error
        try:
            return _output(output, graph_input, given)
        except Exception as error:
            if isinstance(error, GraphInvalidOutput):
                raise
            # What it left in its state can do anything when it is looked at.
            log.error("graph.failed", graph=agent.definition.graph, error=type(error).__name__, frames=frames(error))
            raise GraphInvalidOutput("what the graph left in its state cannot be read") from error


async def _run(
    graph: Pregel[Any, Any, Any, Any], state: Any, config: RunnableConfig, context: Any, emit: Emit | None
) -> Any:
    """Runs a graph to its last values; with `emit`, emits the text of its chat models as it comes, and what it writes to
    the custom stream."""
    output: Any = None
    keys = graph.output_channels
    if emit is None:
        # All that `ainvoke` does beside this is to look for interrupts, which nobody could answer.
        async for values in graph.astream(state, config, context=context, stream_mode="values", output_keys=keys):
            output = values
        return output
    modes: list[StreamMode] = ["messages", "custom", "values"]
    parts = graph.astream(state, config, context=context, stream_mode=modes, output_keys=keys, subgraphs=True)
    async for namespace, mode, part in parts:
        if mode == "values":
            # Subgraphs have values of their own; the answer is the whole graph's.
            if not namespace:
                output = part
        elif mode == "custom":
            emit("custom", _storable_object(part if isinstance(part, dict) else {"value": part}, "a custom event"))
        elif isinstance(part[0], AIMessage) and part[0].text:
            emit("text.delta", {"text": storable_text(str(part[0].text))})
    return output


def _adds_messages(graph: Pregel[Any, Any, Any, Any]) -> bool:
    """Whether a graph's messages are put together by LangGraph's own reducer, as those of MessagesState are."""
    channel = graph.channels.get("messages")
    return isinstance(channel, BinaryOperatorAggregate) and channel.operator is add_messages


def message_maker(kind: type[BaseMessage]) -> Callable[[str, str], BaseMessage]:
    """What makes LangChain's messages of a kind from content and id: equal to those of its constructor, at half its cost.

    A constructor validates anew what has been stored as text, for each message of the history in each turn. These are made
    by filling in a message's slots, as unpickling would; each gets containers of its own, or what a graph adds to a message
    of one visitor would be in those of all.
    """
    state = kind(content="", id="").__getstate__()
    fields = state["__dict__"]
    containers = [(name, type(value)) for name, value in fields.items() if not _is_immutable(value)]
    beside = (state["__pydantic_extra__"], state["__pydantic_private__"])
    if any(fields[name] != container() for name, container in containers) or beside != ({}, None):
        raise TypeError(f"{kind.__name__} begins with more than empty containers")
    new = kind.__new__
    slots = vars(BaseModel)
    set_fields, set_names = slots["__dict__"].__set__, slots["__pydantic_fields_set__"].__set__
    set_extra, set_private = slots["__pydantic_extra__"].__set__, slots["__pydantic_private__"].__set__

    def make(content: str, message_id: str) -> BaseMessage:
        own = fields.copy()
        for name, container in containers:
            own[name] = container()
        own["content"] = content
        own["id"] = message_id
        message = new(kind)
        set_fields(message, own)
        set_names(message, {"content", "id"})
        set_extra(message, {})
        set_private(message, None)
        return message

    return make


def _is_immutable(value: Any) -> bool:
    return value is None or isinstance(value, (str, int, float, bool))


_TO_LANGCHAIN: dict[str, Callable[[str, str], BaseMessage]] = {
    "user": message_maker(HumanMessage),
    "assistant": message_maker(AIMessage),
    "system": message_maker(SystemMessage),
}


def _output(output: Any, graph_input: GraphInput, given: Sequence[BaseMessage]) -> GraphOutput:
    """What a turn needs of a graph's final state, checked. `given` are the messages that it was given."""
    if not isinstance(output, dict):
        raise GraphInvalidOutput(f"the graph's state is {type(output).__name__}, not a dict")
    answers = _added(output.get("messages"), graph_input, given)
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


def _added(messages: Any, graph_input: GraphInput, given: Sequence[BaseMessage]) -> list[AIMessage]:
    """A model's messages among a graph's final ones that are none of those it was given."""
    if not isinstance(messages, list):
        return []
    if all(map(is_, messages, given)):
        messages = messages[len(given) :]  # nearly always a graph adds at the end
    ids = {graph_input.message_uuid, *[message.id for message in graph_input.history]}
    return [message for message in messages if isinstance(message, AIMessage) and message.id not in ids]


def _object(output: dict[str, Any], name: str) -> dict[str, Any] | None:
    value = output.get(name)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise GraphInvalidOutput(f"{name} is {type(value).__name__}, not a dict")
    return _storable_object(value, name)


def _storable_object(value: dict[Any, Any], what: str) -> dict[str, Any]:
    try:
        stored: dict[str, Any] = storable_json(value)
    except ValueError as error:
        raise GraphInvalidOutput(f"{what} cannot be stored: {error}") from error
    return stored


def _tokens(answers: list[AIMessage]) -> int | None:
    used = [message.usage_metadata.get("total_tokens") for message in answers if message.usage_metadata]
    counts = [count for count in used if isinstance(count, int)]
    return sum(counts) if counts else None


def _model(answers: list[AIMessage]) -> str | None:
    for message in reversed(answers):
        name = message.response_metadata.get("model_name") or message.response_metadata.get("model")
        if name:
            return str(name)
    return None


async def load_graphs(file: Path | None, base_urls: Sequence[str] = ()) -> Graphs:
    """The built-in graphs and those of the operator's langgraph.json (None: none). Raises GraphError.

    `base_urls` are the endpoints that agents on the graph `chat` may name; without the dependency group `llm` there is no
    such graph.

    The file is LangGraph's own: `{"graphs": {"<name>": "<./file.py or module>:<variable>"}, "dependencies": ["."]}`.
    """
    graphs = {"echo": echo_graph()}
    checks: dict[str, CheckConfig] = {"echo": _check_echo}
    if importlib.util.find_spec("langchain") is not None:
        chat = importlib.import_module("gateway.chat_graph").ChatGraph(base_urls)
        graphs["chat"], checks["chat"] = chat.compile(), chat.check
    _contain_exits(asyncio.get_running_loop())
    entries: dict[str, Any] = {}
    if file is not None:
        try:
            project = json.loads(file.read_text())
            entries = dict(project["graphs"])
            dependencies = [str(entry) for entry in project.get("dependencies", ["."])]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise GraphError(f"{file}: not a langgraph.json with `graphs`: {type(error).__name__}: {error}") from error
        _add_to_path(file.parent, dependencies)
        for name, reference in entries.items():
            if isinstance(reference, dict):
                reference = reference.get("path", "")  # noqa: PLW2901
            graphs[name] = await _load_graph(name, str(reference), file.parent)
    return Graphs(graphs, {name: check for name, check in checks.items() if name not in entries})


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
        if not agent.definition.active:
            raise AgentInactive
        try:
            msgspec.convert(session_id, SessionId)
        except msgspec.ValidationError as error:
            raise InvalidField("session_id: 16 to 255 of A-Z a-z 0-9 _ . : -", field="session_id") from error
        if storable_value([user_input, metadata]) != [user_input, metadata]:
            raise InvalidField("user_input, metadata: NUL and lone surrogates cannot be stored", field="user_input")
        request = TurnRequest(
            session_id=session_id,
            message=user_input,
            metadata=metadata,
            access=Access(agent.id, normal_domain(str(metadata.get("website_domain", "")))),
            user_agent=str(metadata.get("user_agent", "")),
        )
        result = await self.execute(agent, request)
        return {"response": result.response, "metadata": result.metadata}

    async def execute(self, agent: Agent, request: TurnRequest, admission: Admission | None = None) -> TurnResult:
        """One turn of an agent. Raises a Problem."""
        return await self._turns.execute(agent, request, admission)

    async def stream(self, agent: Agent, request: TurnRequest, admission: Admission | None = None) -> TurnLog | Attached:
        """One turn of an agent as a log of events, or the turn that answers the message already. Raises a Problem."""
        return await self._turns.stream(agent, request, admission)
