"""The sweep after Redis has forgotten something: whatever nobody touches is compared with Postgres too, in the background.

So what was erased is gone from Redis again, also when its visitor never comes back, and operators see what is.
"""

from functools import partial

import structlog

from persistence.errors import Damaged
from persistence.hydrator import Hydrator
from persistence.model.ids import masked
from persistence.model.session import Access
from persistence.postgres.postgres import Postgres
from persistence.redis.keys import Keys
from persistence.redis.partitions import Partitions
from persistence.redis.scripts import Scripts
from persistence.redis.sessions import SessionStore
from persistence.tasks import gather_bounded

log = structlog.get_logger()

PARTITIONS_AT_ONCE = 4
AT_ONCE = 2
"""Sessions of a partition compared side by side: visitors come first."""
BATCH = 500
OPERATOR = Access(authorized=True, trusted=True)


class Sweep:
    """Goes through the sessions and the turn logs of each partition, once an epoch."""

    def __init__(
        self,
        scripts: Scripts,
        keys: Keys,
        store: SessionStore,
        postgres: Postgres,
        hydrator: Hydrator,
        partitions: Partitions,
    ) -> None:
        self._scripts = scripts
        self._partitions = partitions
        self._keys = keys
        self._store = store
        self._postgres = postgres
        self._hydrator = hydrator

    async def run_once(self) -> int:
        """Sweeps the partitions with an epoch that nobody has swept; how many. Those that cannot be reached are passed over
        until they can. Raises RedisUnavailable when none can, or PostgresUnavailable."""
        return sum((await self._partitions.each(self._sweep, PARTITIONS_AT_ONCE)).results)

    async def _sweep(self, partition: int) -> bool:
        key = self._keys.epoch(partition)
        epoch, done = await self._scripts.command("HMGET", key, "epoch", "swept")
        if epoch is None or epoch == done:
            return False
        await self._sweep_sessions(partition, epoch)
        await self._sweep_logs(partition)
        await self._scripts.command("HSET", key, "swept", epoch)
        return True

    async def _sweep_sessions(self, partition: int, epoch: bytes) -> None:
        cursor = 0
        while True:
            reply = await self._scripts.command("ZSCAN", self._keys.live(partition), cursor, "COUNT", BATCH)
            cursor, session_ids = int(reply[0]), [member.decode() for member in reply[1][::2]]
            await gather_bounded((self._compare(session_id, epoch) for session_id in session_ids), AT_ONCE)
            if cursor == 0:
                return

    async def _compare(self, session_id: str, epoch: bytes) -> None:
        found = await self._scripts.command("HMGET", self._keys.session(session_id), "format", "epoch")
        if found[0] is None or found[1] == epoch:
            return
        try:
            await self._hydrator.with_session(session_id, partial(self._store.read, session_id, OPERATOR))
        except Damaged as error:
            log.error("session.damaged", error=str(error))

    async def _sweep_logs(self, partition: int) -> None:
        cursor = 0
        while True:
            reply = await self._scripts.command("HSCAN", self._keys.logs(partition), cursor, "COUNT", BATCH)
            cursor, session_ids = int(reply[0]), [name.decode() for name in reply[1][::2]]
            await gather_bounded(map(self._forget_logs, session_ids), AT_ONCE)
            if cursor == 0:
                return

    async def _forget_logs(self, session_id: str) -> None:
        """Removes the logs of a session that is in neither store."""
        if await self._scripts.command("EXISTS", self._keys.session(session_id)):
            return
        if await self._postgres.find_session(session_id) is not None:
            return
        if await self._store.forget_logs(session_id):
            log.warning("session.logs_forgotten", session=masked(session_id))
