"""Graphs that would keep sessions in the process's memory: with a checkpointer, and with one in a subgraph."""

from langchain_core.messages import AIMessage
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import MessagesState, StateGraph

saver = InMemorySaver()
saver_below = InMemorySaver()


async def _answer(state: MessagesState) -> dict[str, list[AIMessage]]:
    return {"messages": [AIMessage(f"{len(state['messages'])} messages")]}


_builder = StateGraph(MessagesState)
_builder.add_node("answer", _answer)
_builder.set_entry_point("answer")
graph = _builder.compile(checkpointer=saver)

_outer = StateGraph(MessagesState)
_outer.add_node("below", _builder.compile(checkpointer=saver_below))
_outer.set_entry_point("below")
graph_with_subgraph = _outer.compile()
