"""What goes into a graph and what comes out: the one interface between turns and graphs, below both."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from persistence.model.agents import Agent
from persistence.model.session import Message
from persistence.model.storable import storable_text

MAX_INT = 2**31 - 1


class GraphInput(msgspec.Struct):
    """What a graph is given: the history, oldest first, and the new message with its UUID."""

    history: Sequence[Message]
    user_input: str
    message_uuid: str
    context: dict[str, Any]
    metadata: dict[str, Any]
    session_id: str
    channel: str


class GraphOutput(msgspec.Struct):
    """What a graph gave back. `context` is None when it is to stay as it is."""

    response: str
    context: dict[str, Any] | None
    metadata: dict[str, Any]
    tokens_used: int | None = None
    model_used: str | None = None


Emit = Callable[[str, Any], None]

RunGraph = Callable[[Agent, GraphInput, Emit | None], Awaitable[GraphOutput]]


def storable_output(output: GraphOutput) -> GraphOutput:
    """The output without what Postgres cannot store; context and metadata are so already."""
    return GraphOutput(
        response=storable_text(output.response),
        context=output.context,
        metadata=output.metadata,
        tokens_used=None if output.tokens_used is None else min(max(output.tokens_used, 0), MAX_INT),
        model_used=None if output.model_used is None else storable_text(output.model_used)[:100],
    )
