"""A state that is a pydantic model, and a graph with a context schema (LangGraph's word for its configuration)."""

from dataclasses import dataclass
from typing import Any

from langgraph.graph import StateGraph
from langgraph.runtime import Runtime
from pydantic import BaseModel
from shop_agents.state import State  # type: ignore[import-not-found]  # langgraph.json makes it importable


class TypedState(BaseModel):
    """Some of the state, checked by pydantic."""

    user_input: str
    context: dict[str, Any]
    agent_response: str = ""


async def _answer_typed(state: TypedState) -> dict[str, Any]:
    visits = state.context.get("visits", 0) + 1
    return {"agent_response": f"Visit {visits}: {state.user_input}", "context": {"visits": visits}}


_typed = StateGraph(TypedState)
_typed.add_node("answer", _answer_typed)
_typed.set_entry_point("answer")
typed = _typed.compile()


@dataclass
class Settings:
    """What an operator sets in the agent's config."""

    tone: str = "plain"


async def _answer_configured(state: State, runtime: Runtime[Settings]) -> State:
    return {"agent_response": f"{runtime.context.tone}: {state['user_input']}"}


_configured = StateGraph(State, context_schema=Settings)
_configured.add_node("answer", _answer_configured)
_configured.set_entry_point("answer")
configured = _configured.compile()
