"""The answer that is read from a graph's final state."""

import operator
from collections.abc import Callable
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage
from langgraph.graph import StateGraph
from langgraph.graph.message import add_messages

from gateway.graphs.contract import Emit, GraphInput, GraphOutput
from gateway.graphs.graphs import Graphs
from gateway.problems import GraphInvalidOutput
from persistence.model.agents import Agent, AgentDefinition
from persistence.model.session import Message


async def run_node(node: Any, state: Any, emit: Emit | None = None, **schemas: Any) -> GraphOutput:
    """Runs a graph of one node on this kind of state: "Where is it?", after a turn."""
    builder = StateGraph(state, **schemas)
    builder.add_node("node", node)
    builder.set_entry_point("node")
    graphs = Graphs({"helper": builder.compile()})
    past = [Message("id 1", "user", "Hello", ""), Message("id 2", "assistant", "Hi", "")]
    graph_input = GraphInput(past, "Where is it?", "id 3", {}, {}, "session_of_a_test", "text")
    return await graphs.run(Agent("id", "helper", AgentDefinition(graph="helper")), graph_input, emit)


@pytest.mark.parametrize("reducer", [add_messages, operator.add], ids=["LangGraph's", "its own"])
async def test_a_graph_is_given_the_same_messages_whatever_puts_them_together(reducer: Callable[..., Any]) -> None:
    given: list[Any] = []

    def answer(state: Any) -> dict[str, Any]:
        given.extend(state["messages"])
        return {"messages": [AIMessage("It is on its way.", id="answer")]}

    class State(TypedDict):
        messages: Annotated[list[Any], reducer]

    output = await run_node(answer, State)
    assert given == [HumanMessage("Hello", id="id 1"), AIMessage("Hi", id="id 2"), HumanMessage("Where is it?", id="id 3")]
    assert output.response == "It is on its way."


def said(state: dict[str, Any], *messages: BaseMessage) -> list[BaseMessage]:
    return [*state["messages"], *messages]


ANSWER = AIMessage("It is on its way.", id="answer")
ENDINGS: dict[str, Callable[[Any], Any]] = {
    "all of them, and an answer": lambda state: {"messages": said(state, ANSWER)},
    "the answer alone": lambda state: {"messages": [ANSWER]},
    "the answer first": lambda state: {"messages": [ANSWER, *said(state)]},
    "all of them twice, and an answer": lambda state: {"messages": [*said(state), *said(state, ANSWER)]},
    "an answer put into the list it was given": lambda state: state["messages"].append(ANSWER),
}
WITHOUT_ANSWER: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda state: None,
    "all of them twice": lambda state: {"messages": [*said(state), *said(state)]},
    "others of the same ids": lambda state: {"messages": [message.model_copy() for message in state["messages"]]},
    "the older ones again": lambda state: {"messages": said(state, *state["messages"][:2])},
}


class PlainState(TypedDict):
    """Messages without a reducer: a graph leaves what its node returns."""

    messages: list[Any]


@pytest.mark.parametrize("ending", ENDINGS)
async def test_the_answer_is_found_wherever_a_graph_leaves_it(ending: str) -> None:
    assert (await run_node(ENDINGS[ending], PlainState)).response == "It is on its way."


@pytest.mark.parametrize("ending", WITHOUT_ANSWER)
async def test_what_a_graph_was_given_is_not_its_answer(ending: str) -> None:
    with pytest.raises(GraphInvalidOutput, match="added no AI message"):
        await run_node(WITHOUT_ANSWER[ending], PlainState)


@pytest.mark.parametrize("emit", [None, lambda event: None], ids=["at once", "streamed"])
async def test_what_a_graph_keeps_to_itself_is_not_taken_from_it(emit: Emit | None) -> None:
    class Output(TypedDict):
        agent_response: str

    class State(Output):
        metadata: dict[str, Any]

    def answer(state: Any) -> dict[str, Any]:
        return {"agent_response": "It is on its way.", "metadata": {"note": "its own"}}

    output = await run_node(answer, State, emit, output_schema=Output)
    assert (output.response, output.metadata) == ("It is on its way.", {})
