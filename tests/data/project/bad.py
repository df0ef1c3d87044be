"""Graphs that fail: each in its own way, none for longer than half a minute."""

import asyncio
import sys
import time
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.func import entrypoint
from shop_agents.state import State, compiled  # type: ignore[import-not-found]  # langgraph.json makes it importable

BOUND_S = 30.0
BLOCK_S = 2.0


class NotAnException(BaseException):
    """What a library in another language raises when it panics."""


async def _raise(state: State) -> State:
    raise RuntimeError(f"the model is gone, and a secret of the visitor: {state['user_input']}")


async def _raise_base(state: State) -> State:
    raise NotAnException("panic")


async def _exit(state: State) -> State:
    sys.exit("the graph gives up")


def _exit_in_thread(state: State) -> State:
    sys.exit("the graph gives up")


async def _cancel_itself(state: State) -> State:
    raise asyncio.CancelledError


async def _hang(state: State) -> State:
    await asyncio.sleep(BOUND_S)
    return {"agent_response": "too late"}


async def _swallow_cancellation(state: State, config: RunnableConfig) -> State:
    until = time.monotonic() + config.get("configurable", {}).get("for_s", BOUND_S)
    while (left := until - time.monotonic()) > 0:
        try:
            await asyncio.sleep(left)
        except asyncio.CancelledError:
            continue
    return {"agent_response": "too late"}


async def _turn_cancellation_into_error(state: State) -> State:
    try:
        await asyncio.sleep(BOUND_S)
    except asyncio.CancelledError as error:
        raise ConnectionError("the call of the model was cut") from error
    return {"agent_response": "too late"}


def _block(state: State) -> State:
    time.sleep(BLOCK_S)
    return {"agent_response": "too late"}


async def _answer_with_dict(state: State) -> State:
    return {"agent_response": {"text": "Hello"}}


async def _context_is_list(state: State) -> State:
    return {"agent_response": "Hello", "context": ["turns", 1]}


async def _metadata_is_no_json(state: State) -> State:
    return {"agent_response": "Hello", "metadata": {"model": object()}}


async def _metadata_is_too_deep(state: State) -> State:
    nested: dict[str, Any] = {}
    for _ in range(600):
        nested = {"in": nested}
    return {"agent_response": "Hello", "metadata": nested}


async def _say_nothing(state: State) -> State:
    return {"next_action": "wait"}


@entrypoint()
async def state_is_no_dict(state: dict[str, Any]) -> str:
    """A graph of LangGraph's functional API, whose final state is what the function returns."""
    return "Hello"


raises = compiled(_raise)
raises_base = compiled(_raise_base)
exits = compiled(_exit)
exits_in_thread = compiled(_exit_in_thread)
cancels_itself = compiled(_cancel_itself)
hangs = compiled(_hang)
swallows_cancellation = compiled(_swallow_cancellation)
turns_cancellation_into_error = compiled(_turn_cancellation_into_error)
blocks = compiled(_block)
answers_with_dict = compiled(_answer_with_dict)
context_is_list = compiled(_context_is_list)
metadata_is_no_json = compiled(_metadata_is_no_json)
metadata_is_too_deep = compiled(_metadata_is_too_deep)
says_nothing = compiled(_say_nothing)
