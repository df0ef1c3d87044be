"""What a graph is given: its state, its config and its context."""

import copy
from typing import Any

from langchain_core.messages import BaseMessage
from langchain_core.runnables import RunnableConfig
from langgraph.channels import BinaryOperatorAggregate
from langgraph.graph.message import add_messages
from langgraph.pregel import Pregel
from langgraph.types import Overwrite

from gateway.graphs.contract import GraphInput
from gateway.graphs.messages import TO_LANGCHAIN
from persistence.model.agents import Agent


def messages_of(graph_input: GraphInput) -> list[BaseMessage]:
    """The history and the new message, as LangChain's messages."""
    messages = [TO_LANGCHAIN[message.role](message.content, message.id) for message in graph_input.history]
    messages.append(TO_LANGCHAIN["user"](graph_input.user_input, graph_input.message_uuid))
    return messages


def adds_messages(graph: Pregel[Any, Any, Any, Any]) -> bool:
    """Whether a graph's messages are merged by LangGraph's own reducer, as those of MessagesState are."""
    channel = graph.channels.get("messages")
    return isinstance(channel, BinaryOperatorAggregate) and channel.operator is add_messages


def first_state(graph_input: GraphInput, messages: list[BaseMessage], *, overwrite: bool) -> dict[str, Any]:
    """The state that a run starts from, in copies: what a graph changes in place is compared with what it was given.

    `overwrite` hands the messages over without the reducer (see `adds_messages`), which would look up each by its id among
    those before it, and come to the same list.
    """
    given: Any = messages.copy()
    context, metadata = copy.deepcopy((graph_input.context, graph_input.metadata))
    return {
        "messages": Overwrite(given) if overwrite else given,
        "user_input": graph_input.user_input,
        "agent_response": "",
        "context": context,
        "metadata": metadata,
        "session_id": graph_input.session_id,
        "channel": graph_input.channel,
        "next_action": "",
    }


def config_of(agent: Agent, graph_input: GraphInput) -> RunnableConfig:
    """The config of a run: the agent's own, and which session and agent it is for."""
    return {
        "configurable": {
            **agent.definition.config,
            "thread_id": graph_input.session_id,
            "session_id": graph_input.session_id,
            "agent_id": agent.id,
            "channel": graph_input.channel,
        }
    }


def context_of(graph: Pregel[Any, Any, Any, Any], agent: Agent) -> dict[str, Any] | None:
    """LangGraph's runtime context, for a graph with a context schema: the agent's config."""
    return agent.definition.config if graph.context_schema is not None else None
