"""What asyncio lacks for running work side by side."""

import asyncio
import inspect
from collections.abc import Coroutine, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")


def retrieve(task: "asyncio.Future[Any]") -> None:
    """Done callback of a task that may be abandoned: asyncio does not report its exception as never retrieved."""
    if not task.cancelled():
        task.exception()


async def gather_bounded(work: Iterable[Coroutine[Any, Any, Result]], at_once: int = 32) -> list[Result]:
    """Runs coroutines, at most `at_once` at a time; results in order. All have ended before the first error is raised."""
    free = asyncio.Semaphore(at_once)
    coroutines = list(work)

    async def one(coroutine: Coroutine[Any, Any, Result]) -> Result:
        async with free:
            return await coroutine

    try:
        outcomes = await asyncio.gather(*map(one, coroutines), return_exceptions=True)
    finally:
        for coroutine in coroutines:
            # After a cancellation those that had not begun never will, and Python warns of coroutines never awaited.
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                coroutine.close()
    results = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results
