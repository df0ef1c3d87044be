"""Reads a turn's answer from a graph's final state, and makes it storable."""

from collections.abc import Sequence
from operator import is_
from typing import Any

from langchain_core.messages import AIMessage, BaseMessage

from gateway.graphs.contract import GraphInput, GraphOutput
from gateway.problems import GraphInvalidOutput
from persistence.model.storable import storable_json, storable_text

MAX_TOKENS = 2**31 - 1
"""The largest integer of its column."""

MAX_MODEL_CHARS = 100


def read_output(state: Any, graph_input: GraphInput, given: Sequence[BaseMessage]) -> GraphOutput:
    """What a turn needs of a graph's final state; `given` are the messages it was given. Raises GraphInvalidOutput."""
    if not isinstance(state, dict):
        raise GraphInvalidOutput(f"the graph's state is {type(state).__name__}, not a dict")
    answers = _added(state.get("messages"), graph_input, given)
    response = _response(state.get("agent_response"), answers)
    context = _object(state, "context")
    metadata = _object(state, "metadata")
    return GraphOutput(
        response=response,
        context=None if context is None or context == graph_input.context else context,
        # A graph that leaves the visitor's metadata as they are has returned none.
        metadata={} if metadata is None or metadata == graph_input.metadata else metadata,
        tokens_used=_tokens(answers),
        model_used=_model(answers),
    )


def storable_object(value: dict[Any, Any], what: str) -> dict[str, Any]:
    """The object as it will be read again. Raises GraphInvalidOutput that names it as `what`."""
    try:
        stored: dict[str, Any] = storable_json(value)
    except ValueError as error:
        raise GraphInvalidOutput(f"{what} cannot be stored: {error}") from error
    return stored


def _added(messages: Any, graph_input: GraphInput, given: Sequence[BaseMessage]) -> list[AIMessage]:
    """The AI messages among a graph's final ones that are none of those it was given."""
    if not isinstance(messages, list):
        return []
    if all(map(is_, messages, given)):
        messages = messages[len(given) :]  # nearly always a graph adds at the end
    ids = {graph_input.message_uuid, *[message.id for message in graph_input.history]}
    return [message for message in messages if isinstance(message, AIMessage) and message.id not in ids]


def _response(text: Any, answers: list[AIMessage]) -> str:
    """The state's `agent_response`, or else the text of the last AI message."""
    if text is None or text == "":
        if not answers:
            raise GraphInvalidOutput("the graph set no agent_response and added no AI message")
        text = str(answers[-1].text)
    if not isinstance(text, str):
        raise GraphInvalidOutput(f"agent_response is {type(text).__name__}, not str")
    return storable_text(text)


def _object(state: dict[str, Any], name: str) -> dict[str, Any] | None:
    value = state.get(name)
    if value is None:
        return None
    if not isinstance(value, dict):
        raise GraphInvalidOutput(f"{name} is {type(value).__name__}, not a dict")
    return storable_object(value, name)


def _tokens(answers: list[AIMessage]) -> int | None:
    used = [message.usage_metadata.get("total_tokens") for message in answers if message.usage_metadata]
    counts = [count for count in used if isinstance(count, int)]
    return min(max(sum(counts), 0), MAX_TOKENS) if counts else None


def _model(answers: list[AIMessage]) -> str | None:
    """The name that the last model gave itself."""
    for message in reversed(answers):
        name = message.response_metadata.get("model_name") or message.response_metadata.get("model")
        if name:
            return storable_text(str(name))[:MAX_MODEL_CHARS]
    return None
