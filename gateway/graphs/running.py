"""Runs a graph to its end, and hands on what it streams."""

from typing import Any

from langchain_core.messages import AIMessage
from langchain_core.runnables import RunnableConfig
from langgraph.pregel import Pregel
from langgraph.types import StreamMode

from gateway.graphs.contract import Emit
from gateway.graphs.output import storable_object
from gateway.streams.events import Custom, TextDelta
from persistence.model.storable import storable_text

MODES: list[StreamMode] = ["messages", "custom", "values"]


async def final_state(graph: Pregel[Any, Any, Any, Any], state: Any, config: RunnableConfig, context: Any) -> Any:
    """Runs a graph; its last values."""
    output: Any = None
    keys = graph.output_channels
    # Beside this, `ainvoke` looks for interrupts, which nobody could answer.
    async for values in graph.astream(state, config, context=context, stream_mode="values", output_keys=keys):
        output = values
    return output


async def streamed_state(
    graph: Pregel[Any, Any, Any, Any], state: Any, config: RunnableConfig, context: Any, emit: Emit
) -> Any:
    """Runs a graph; its last values. Emits the text of its chat models and what it writes to the custom stream.

    Raises GraphInvalidOutput for a custom event that cannot be stored.
    """
    output: Any = None
    keys = graph.output_channels
    parts = graph.astream(state, config, context=context, stream_mode=MODES, output_keys=keys, subgraphs=True)
    async for namespace, mode, part in parts:
        if mode == "values":
            # Subgraphs have values of their own; the answer is the whole graph's.
            if not namespace:
                output = part
        elif mode == "custom":
            emit(Custom(storable_object(part if isinstance(part, dict) else {"value": part}, "a custom event")))
        elif isinstance(part[0], AIMessage) and part[0].text:
            emit(TextDelta(storable_text(str(part[0].text))))
    return output
