"""A graph that is not compiled, and functions that make one. `made` counts their calls."""

from typing import Any

from shop_agents.state import State, compiled, uncompiled  # type: ignore[import-not-found]  # langgraph.json makes it importable

made: list[str] = []


async def _answer(state: State) -> State:
    return {"agent_response": f"Made: {state['user_input']}", "metadata": {"made": len(made)}}


builder = uncompiled(_answer)


def make() -> Any:
    """A function that makes a graph."""
    made.append("make")
    return compiled(_answer)


def make_with_config(config: dict[str, Any]) -> Any:
    """A function that wants a config, and gives a graph that is not compiled."""
    made.append(f"make_with_config {sorted(config)}")
    return uncompiled(_answer)


async def make_later() -> Any:
    """A coroutine function that makes a graph."""
    made.append("make_later")
    return compiled(_answer)
