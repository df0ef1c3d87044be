"""A graph that does with a visitor's words what graphs do by mistake: the first word of the message says which mistake."""

import asyncio
import logging
import threading
import warnings
from typing import Any

from langgraph.graph import END, StateGraph
from typing_extensions import TypedDict


class State(TypedDict, total=False):
    user_input: str
    agent_response: Any
    context: dict[str, Any]
    metadata: dict[str, Any]


def _raise(text: str) -> None:
    raise ValueError(text)


async def _raise_later(text: str) -> None:
    raise ValueError(text)


async def _answer(state: State) -> State:
    text = state["user_input"]
    answer = f"{state['metadata']['output']} {text}"
    match text.partition(" ")[0]:
        case "raise":
            try:
                _raise(text)
            except ValueError as error:
                raise RuntimeError(f"the model said no to {text}") from error
        case "group":
            raise ExceptionGroup(text, [ValueError(text)])
        case "log":
            logging.getLogger("shop.graph").error("could not answer %s", text)
            logging.getLogger("langchain_core.callbacks").warning(f"Error in callback: {text!r}")
            try:
                _raise(text)
            except ValueError:
                logging.getLogger("uvicorn.error").exception("Exception in ASGI application, with %s", text)
        case "warn":
            warnings.warn(f"unexpected value [input_value={text!r}]", stacklevel=1)
        case "task":
            task = asyncio.create_task(_raise_later(text))
            while not task.done():
                await asyncio.sleep(0)
            del task
        case "callback":
            asyncio.get_running_loop().call_soon(_raise, text)
        case "thread":
            thread = threading.Thread(target=_raise, args=(text,), name="planted")
            thread.start()
            await asyncio.to_thread(thread.join)
        case "list":
            return {"agent_response": [answer]}
        case "print":
            print(text, flush=True)
        case "nul":
            answer += "\0"
    return {"agent_response": answer, "context": {"remembered": f"{state['metadata']['context']} {text}"}}


builder = StateGraph(State)
builder.add_node("answer", _answer)
builder.set_entry_point("answer")
builder.add_edge("answer", END)
graph = builder.compile()
