"""A graph that is named by its module: `shop_agents.returns:graph`."""

from shop_agents.state import State, compiled  # type: ignore[import-not-found]  # langgraph.json makes it importable


async def _answer(state: State) -> State:
    return {"agent_response": f"About returns: {state['user_input']}"}


graph = compiled(_answer)
