"""The watch of the Redis servers: once a second each is asked who it is, and the Sentinels who is master."""

import asyncio

import structlog

from persistence.errors import PostgresUnavailable, RedisUnavailable
from persistence.redis.scripts import Scripts
from persistence.settler import Settler

log = structlog.get_logger()

EVERY_S = 1.0


class Watch:
    """One process' watch. That of a worker also ends the epochs that Postgres knows to be over."""

    def __init__(self, scripts: Scripts, settler: Settler, *, of_worker: bool) -> None:
        self._scripts = scripts
        self._settler = settler
        self._of_worker = of_worker
        self._switched: asyncio.Future[None] | None = None

    async def run(self) -> None:
        """Looks until cancelled."""
        while True:
            try:
                await self.look_next()
            except RedisUnavailable as error:
                log.info("redis.look_failed", error=str(error))

    async def look_next(self) -> None:
        """Looks a second from now, or at once when a Sentinel announces another master. Raises RedisUnavailable."""
        if self._switched is None:
            self._switched = asyncio.ensure_future(self._scripts.switched())
        await asyncio.wait({self._switched}, timeout=EVERY_S)
        if self._switched.done():
            switched, self._switched = self._switched, None
            switched.result()
        await self.look()

    def close(self) -> None:
        """Ends the subscription to the Sentinels."""
        if self._switched is not None:
            self._switched.cancel()
            self._switched = None

    async def look(self) -> None:
        """One look. Raises RedisUnavailable."""
        await self._scripts.check_servers()
        if self._of_worker:
            try:
                await self._settler.look(self._scripts)
            except PostgresUnavailable:
                # Nothing can be over that nobody can flush.
                return
