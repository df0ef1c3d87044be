"""The lease of a running turn, renewed for as long as its graph runs."""

import asyncio
from collections.abc import Callable
from types import TracebackType

import structlog

from persistence.errors import RedisUnavailable
from persistence.redis.sessions import SessionStore

log = structlog.get_logger()


class Lease:
    """Within `with`, renews the lease of a turn three times per lease; calls `on_lost` when the session is another's."""

    def __init__(self, store: SessionStore, session_id: str, turn_id: str, fence: int, on_lost: Callable[[], None]) -> None:
        self._store = store
        self._session_id = session_id
        self._turn_id = turn_id
        self._fence = fence
        self._on_lost = on_lost
        self._pause_s = store.lease_ms / 3000
        self._renewing: asyncio.Task[None] | None = None

    def __enter__(self) -> None:
        # Most turns end before their lease needs renewing: a timer is cheaper than a task.
        self._timer = asyncio.get_running_loop().call_later(self._pause_s, self._start)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._timer.cancel()
        if self._renewing is not None:
            self._renewing.cancel()

    def _start(self) -> None:
        self._renewing = asyncio.create_task(self._renew())

    async def _renew(self) -> None:
        while True:
            try:
                if not await self._store.renew(self._session_id, self._turn_id, self._fence):
                    self._on_lost()
                    return
            except RedisUnavailable as error:
                # The lease may outlive the fault; if it does not, the fence keeps the commit out.
                log.warning("turn.renew_failed", turn_id=self._turn_id, error=str(error))
            except Exception:
                log.error("turn.renew_failed", turn_id=self._turn_id, exc_info=True)
            await asyncio.sleep(self._pause_s)
