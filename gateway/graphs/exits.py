"""Keeps a graph's SystemExit and KeyboardInterrupt from ending the pod.

LangGraph runs nodes as tasks, and asyncio raises these two out of a task into the event loop.
"""

import asyncio
from collections.abc import Coroutine
from contextvars import ContextVar
from typing import Any

in_graph: ContextVar[bool] = ContextVar("in_graph", default=False)
"""Whether the code that runs is a graph's: tasks made there are contained."""


def contain_exits(loop: asyncio.AbstractEventLoop) -> None:
    """Makes every task that a graph starts raise RuntimeError in their place."""

    def make_task(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, Any], **options: Any) -> "asyncio.Task[Any]":
        return asyncio.Task(_contained(work) if in_graph.get() else work, loop=loop, **options)

    loop.set_task_factory(make_task)  # type: ignore[arg-type]  # the stub wants it generic


async def _contained(work: Coroutine[Any, Any, Any]) -> Any:
    try:
        return await work
    except (SystemExit, KeyboardInterrupt) as error:
        raise RuntimeError(f"the graph raised {type(error).__name__}") from error
