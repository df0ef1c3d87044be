"""A graph as slow as the visitor says: `0.5 Hello` takes half a second."""

import asyncio

from shop_agents.state import State, compiled  # type: ignore[import-not-found]  # langgraph.json makes it importable


async def _answer(state: State) -> State:
    await asyncio.sleep(float(state["user_input"].split()[0]))
    return {"agent_response": f"Answer to {state['user_input']}", "metadata": {"history": len(state["messages"]) - 1}}


graph = compiled(_answer)
