"""The graph `recall`: it answers with all that it was given to remember, so that whoever asks sees what is missing."""

import asyncio
import json
import re
from typing import Any

from langgraph.graph import MessagesState, StateGraph

SECRET = re.compile(r"secret-[0-9a-f]{16}")


class State(MessagesState):
    """What the gateway hands in and takes out."""

    user_input: str
    context: dict[str, Any]
    agent_response: str


async def recall(state: State) -> dict[str, Any]:
    """Messages are `<secret> <number> <work in ms>`. Answers name the number, the earlier ones, and all secrets seen."""
    _, number, work_ms = state["user_input"].split()
    await asyncio.sleep(int(work_ms) / 1000)
    earlier = [str(message.content) for message in state["messages"][:-1]]
    context = state["context"]
    known = {
        "number": int(number),
        "earlier": [int(text.split()[1]) for text in earlier if not text.startswith("{")],
        "turns": context.get("turns", 0),
        "secrets": sorted(set(SECRET.findall(" ".join([*earlier, json.dumps(context), state["user_input"]])))),
    }
    secret = SECRET.findall(state["user_input"])[0]
    return {
        "agent_response": json.dumps(known),
        "context": {"turns": context.get("turns", 0) + 1, "secret": secret},
    }


builder = StateGraph(State)
builder.add_node("recall", recall)
builder.set_entry_point("recall")
graph = builder.compile()
