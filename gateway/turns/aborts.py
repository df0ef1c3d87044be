"""Gives back what failed turns hold in Redis, in the background while Redis is away."""

import asyncio
from contextlib import suppress
from time import monotonic

import structlog

from persistence.errors import RedisUnavailable
from persistence.redis.log_entries import Part
from persistence.redis.sessions import SessionStore
from persistence.retry import Attempts, Backoff

log = structlog.get_logger()

BACKOFF = Backoff(0.2, 0.2)

WAIT_S = 0.1


class Aborts:
    """The aborts of a pod that are on their way. Each is tried for as long as its turn's lease may last."""

    def __init__(self, store: SessionStore) -> None:
        self._store = store
        self._pending: set[asyncio.Task[None]] = set()
        self._draining = False

    async def abort(self, session_id: str, turn_id: str, fence: int, part: Part | None) -> None:
        """Gives up a turn, running or waiting; `part` ends its log. After 0.1 s it goes on in the background."""
        task = asyncio.create_task(self._abort(session_id, turn_id, fence, part))
        self._pending.add(task)
        task.add_done_callback(self._pending.discard)
        # Usually done at once; while Redis is away the visitor is not kept waiting for a second call.
        await asyncio.wait({task}, timeout=WAIT_S)

    async def _abort(self, session_id: str, turn_id: str, fence: int, part: Part | None) -> None:
        attempts = Attempts(BACKOFF, deadline_s=monotonic() + self._store.lease_ms / 1000)
        with suppress(RedisUnavailable):
            while True:
                try:
                    await self._store.abort(session_id, turn_id, fence, part)
                    return
                except RedisUnavailable as error:
                    log.warning("turn.abort_failed", turn_id=turn_id, error=str(error))
                    # A pod that stops does not wait for Redis: the lease ends the turn, as it would end a dead pod's.
                    if self._draining:
                        return
                    await attempts.pause(error)
                except Exception:
                    # The lease ends the turn, as it would end a dead pod's.
                    log.error("turn.abort_failed", turn_id=turn_id, exc_info=True)
                    return

    def begin_drain(self) -> None:
        """From now on an abort that fails is not tried again."""
        self._draining = True

    async def drain(self) -> None:
        """Waits for the pending aborts."""
        await asyncio.gather(*self._pending, return_exceptions=True)
