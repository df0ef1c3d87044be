"""Graphs that do what one should not but many do, and that work."""

from shop_agents.state import State, compiled  # type: ignore[import-not-found]  # langgraph.json makes it importable


async def _change_in_place(state: State) -> State:
    context, metadata = state["context"], state["metadata"]
    context["turns"] = context.get("turns", 0) + 1
    metadata["turns"] = context["turns"]
    return {"agent_response": f"Turn {context['turns']}", "context": context, "metadata": metadata}


async def _override(state: State) -> State:
    """Returns metadata under the gateway's own names."""
    return {"agent_response": "mine", "metadata": {"session_id": "another", "replayed": True, "own": 1}}


async def _odd_text(state: State) -> State:
    """Text that neither JSON in UTF-8 nor Postgres can hold: NUL and a lone surrogate."""
    odd = "a\0b\ud800c"
    return {"agent_response": odd, "context": {odd: [odd]}, "metadata": {odd: {"deep": odd}}}


changes_in_place = compiled(_change_in_place)
overrides = compiled(_override)
odd_text = compiled(_odd_text)
