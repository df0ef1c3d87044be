"""The supervisor of long-lived tasks: one that fails is seen, said, and started again.

What always holds: no exception ends a task for good, of whatever type; while a task is down, or fails again and again, its
process knows (`down`), and a pod is not ready.
"""

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic

import structlog

from persistence.errors import PersistenceError
from persistence.retry import Attempts, Backoff

log = structlog.get_logger()

BACKOFF = Backoff(0.2, 2.0)
STEADY_S = 5.0
"""A task that has run for so long since its last failure is up."""


def told(error: Exception) -> str:
    """What may be logged of an error: the text only of this package's own, for that of others may quote a visitor."""
    name = type(error).__name__
    return f"{name}: {error}" if isinstance(error, PersistenceError) else name


class Supervisor:
    """The long-lived tasks of a process, by name."""

    def __init__(self) -> None:
        self._failed_at: dict[str, float] = {}
        self._pausing: set[str] = set()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def down(self) -> list[str]:
        """The tasks that wait for their next start, or have failed again lately."""
        now = monotonic()
        return sorted(
            name for name, failed_at in self._failed_at.items() if name in self._pausing or now - failed_at < STEADY_S
        )

    def start(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Runs a task from now on, until `stop`. One that returns has done its work."""
        self._tasks.append(asyncio.create_task(self.keep(name, run), name=name))

    async def keep(self, name: str, run: Callable[[], Awaitable[None]]) -> None:
        """Runs until it returns, again after each failure."""
        attempts = Attempts(BACKOFF)
        while True:
            began_at = monotonic()
            failed: Exception
            try:
                await run()
            except asyncio.CancelledError:
                task = asyncio.current_task()
                if task is None or task.cancelling():
                    raise
                # Something that the task waits for was cancelled, and not the task.
                failed = RuntimeError("cancelled within")
            except Exception as error:
                failed = error
            else:
                self._failed_at.pop(name, None)
                return
            if monotonic() - began_at > STEADY_S:
                attempts.reset()
            await self.failed(name, failed, attempts.next_pause_s(failed))

    async def failed(self, name: str, error: Exception, pause_s: float) -> None:
        """Says that a task has failed, and waits before it starts again."""
        foreseen = isinstance(error, PersistenceError)
        log.error("task.failed", task=name, error=told(error), retry_in_s=pause_s, exc_info=None if foreseen else error)
        self._failed_at[name] = monotonic()
        self._pausing.add(name)
        try:
            await asyncio.sleep(pause_s)
        finally:
            self._pausing.discard(name)

    async def stop(self) -> None:
        """Cancels the tasks until all have ended, again every 0.5 s: in Python 3.11 `wait_for` can lose a cancellation."""
        pending = set(self._tasks)
        while pending:
            for task in pending:
                task.cancel()
            _, pending = await asyncio.wait(pending, timeout=0.5)
