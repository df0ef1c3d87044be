"""Settles servers of Redis: begins an epoch on each that is another than before, above all that Postgres knows of.

Called by the scripts before the first use of a server, and by the worker once a second. A pod that cannot ask Postgres goes
on with what Redis has; the worker settles it as soon as it can.
"""

import asyncio

import structlog

from persistence.errors import PostgresUnavailable, RedisUnavailable
from persistence.postgres.postgres import Postgres
from persistence.redis.epochs import Epochs, Mark, RunAll
from persistence.redis.scripts import Scripts

log = structlog.get_logger()

POSTGRES_TIMEOUT_S = 0.5
"""How long the first calls of a server wait for Postgres."""


class Settler:
    """Begins epochs, in Redis and in Postgres."""

    def __init__(self, epochs: Epochs, postgres: Postgres) -> None:
        self._epochs = epochs
        self._postgres = postgres

    async def settle(self, server: str, run_all: RunAll) -> bool:
        """Settles every partition of a server; False when Postgres could not be asked. Raises PersistenceError."""
        open_epochs = await self._epochs.unsettled(run_all, server)
        if not open_epochs:
            return True
        try:
            async with asyncio.timeout(POSTGRES_TIMEOUT_S):
                known = {partition: Mark(*mark) for partition, mark in (await self._postgres.load_marks()).items()}
        except (PostgresUnavailable, TimeoutError) as error:
            log.warning("redis.not_settled", partitions=len(open_epochs), error=str(error))
            # Nothing works without any epoch. This one is no server's, so that it ends when Postgres is back.
            empty = {partition: Mark() for partition, epoch in open_epochs.items() if epoch == 0}
            await self._epochs.settle(run_all, "", empty)
            return False
        marks = {partition: known.get(partition, Mark()) for partition in open_epochs}
        begun = await self._epochs.settle(run_all, server, marks)
        await self._raise(begun)
        # A Redis that nobody has used before has nothing to forget.
        level = "warning" if any(open_epochs.values()) else "info"
        getattr(log, level)("redis.settled", partitions=len(begun), epoch=max(begun.values(), default=0))
        return True

    async def look(self, scripts: Scripts) -> int:
        """Ends the epochs of partitions of which Postgres knows a newer one, or that have sessions that nobody has compared
        with it; how many. Those that cannot be reached have to wait. Raises PersistenceError."""
        known = await self._postgres.load_marks()
        held = await self._epochs.read_all(scripts)
        begun = {}
        for one in held:
            mark = known.get(one.partition, (0, 0))[0]
            if one.epoch and (one.epoch < mark or one.vouched):
                after = one.epoch if one.vouched else mark - 1
                try:
                    begun[one.partition] = await self._epochs.end(scripts, one, after)
                except RedisUnavailable as error:
                    log.warning("redis.epoch_not_ended", partition=one.partition, error=str(error))
        if begun:
            log.warning("redis.epoch_ended", partitions=len(begun), epoch=max(begun.values()))
            await self._raise(begun)
        return len(begun)

    async def _raise(self, epochs: dict[int, int]) -> None:
        try:
            await self._postgres.raise_marks(epochs)
        except PostgresUnavailable as error:
            # Each flush raises them too.
            log.warning("redis.epoch_not_noted", error=str(error))
