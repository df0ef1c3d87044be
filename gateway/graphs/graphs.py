"""LangGraph: the operator's graphs, compiled once per process, and one call of a graph for one turn.

The only module that knows langgraph. It is handed what the Redis layer gave and hands back what is to be stored; it
holds no session state, and graphs keep none of their own: a checkpointer of theirs is left out."""

import asyncio
import copy
from collections.abc import Callable, Mapping, Sequence
from operator import is_
from types import MappingProxyType
from typing import Any

import structlog
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.runnables import RunnableConfig
from langgraph.channels import BinaryOperatorAggregate
from langgraph.graph.message import add_messages
from langgraph.pregel import Pregel
from langgraph.types import Overwrite, StreamMode

from gateway.graphs.contract import Emit, GraphInput, GraphOutput
from gateway.graphs.exits import in_graph
from gateway.graphs.messages import TO_LANGCHAIN
from gateway.logs import frames
from gateway.problems import GraphFailed, GraphInvalidOutput, GraphNotConfigured, InvalidField
from gateway.streams.events import Custom, TextDelta
from persistence.model.agents import Agent, AgentDefinition
from persistence.model.storable import storable_json, storable_text

log = structlog.get_logger()

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
        given = [TO_LANGCHAIN[message.role](message.content, message.id) for message in graph_input.history]
        given.append(TO_LANGCHAIN["user"](graph_input.user_input, graph_input.message_uuid))
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
        in_graph.set(True)
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
            emit(Custom(_storable_object(part if isinstance(part, dict) else {"value": part}, "a custom event")))
        elif isinstance(part[0], AIMessage) and part[0].text:
            emit(TextDelta(storable_text(str(part[0].text))))
    return output


def _adds_messages(graph: Pregel[Any, Any, Any, Any]) -> bool:
    """Whether a graph's messages are put together by LangGraph's own reducer, as those of MessagesState are."""
    channel = graph.channels.get("messages")
    return isinstance(channel, BinaryOperatorAggregate) and channel.operator is add_messages


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
