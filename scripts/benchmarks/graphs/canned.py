"""The graph of all rows: one async node with a canned answer. LangGraph's plain MessagesState, as most graphs have it."""

from langchain_core.messages import AIMessage
from langgraph.graph import MessagesState, StateGraph

ANSWER = ("It is on its way to you, and should be there on Friday. " * 4)[:200]


async def answer(state: MessagesState) -> dict[str, list[AIMessage]]:
    return {"messages": [AIMessage(ANSWER)]}


builder = StateGraph(MessagesState)
builder.add_node("answer", answer)
builder.set_entry_point("answer")
graph = builder.compile()
