"""The state that the gateway hands to a graph and takes back, and the short way to a graph of one node."""

from collections.abc import Awaitable, Callable
from typing import Annotated, Any, TypedDict

from langchain_core.messages import AnyMessage
from langgraph.graph import StateGraph, add_messages
from langgraph.graph.state import CompiledStateGraph


class State(TypedDict, total=False):
    """Everything the gateway knows of a turn."""

    messages: Annotated[list[AnyMessage], add_messages]
    user_input: str
    agent_response: Any
    context: Any
    metadata: Any
    session_id: str
    channel: str
    next_action: str


Node = Callable[[State], Awaitable[State] | State]


def uncompiled(node: Node) -> StateGraph[State]:
    """A graph of one node."""
    graph = StateGraph(State)
    graph.add_node("node", node)  # type: ignore[arg-type]  # its overloads know no union
    graph.set_entry_point("node")
    return graph


def compiled(node: Node) -> CompiledStateGraph[State]:
    """A graph of one node, compiled."""
    return uncompiled(node).compile()
