"""What goes into a graph and what comes out: the one interface between turns and graphs, below both."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import msgspec

from gateway.streams.events import Event
from persistence.model.agents import Agent
from persistence.model.session import Message


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
    """What a graph gave back: all of it can be stored. `context` is None when it is to stay as it is."""

    response: str
    context: dict[str, Any] | None
    metadata: dict[str, Any]
    tokens_used: int | None = None
    model_used: str | None = None


Emit = Callable[[Event], None]
"""Takes an event of a streamed turn, whose data can be stored. Never waits."""

RunGraph = Callable[[Agent, GraphInput, Emit | None], Awaitable[GraphOutput]]
"""Runs the agent's graph once. Raises GraphNotConfigured, GraphFailed or GraphInvalidOutput."""
