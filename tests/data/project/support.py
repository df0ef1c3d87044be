"""The support agent: the whole state, two nodes. It counts turns in `context` and says in `metadata` what it saw."""

from langchain_core.messages import AIMessage
from langgraph.graph import StateGraph
from shop_agents.state import State  # type: ignore[import-not-found]  # langgraph.json makes it importable


async def _route(state: State) -> State:
    return {"next_action": "refund" if "refund" in state["user_input"].lower() else "answer"}


async def _answer(state: State) -> State:
    turns = state["context"].get("turns", 0) + 1
    text = f"{state['next_action']} {turns}: {state['user_input']}"
    return {
        "agent_response": text,
        "messages": [AIMessage(text)],
        "context": {**state["context"], "turns": turns},
        "metadata": {
            "seen": [f"{message.type}: {message.text}" for message in state["messages"]],
            "session": state["session_id"],
            "channel": state["channel"],
            "given": state["metadata"],
        },
    }


_builder = StateGraph(State)
_builder.add_node("route", _route)
_builder.add_node("answer", _answer)
_builder.set_entry_point("route")
_builder.add_edge("route", "answer")
graph = _builder.compile()
