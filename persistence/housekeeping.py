"""What has to be done from time to time: idle sessions time out, turns of dead pods are let go, lists are trimmed.

Called by the worker. Everything here may run in several workers at once and be repeated.
"""

from datetime import datetime, timedelta
from itertools import chain
from time import monotonic, time

import structlog

from persistence.agents import AgentCopies
from persistence.connection import gather_bounded
from persistence.errors import Damaged
from persistence.hydrator import Hydrator
from persistence.keys import Keys, masked
from persistence.postgres import Postgres
from persistence.scripts import Scripts
from persistence.sessions import SessionStore

log = structlog.get_logger()

TIMEOUTS_BATCH = 100
TIMEOUTS_EVERY_S = 15.0
TRIM_BATCH = 500
TRIM_PARTITIONS = 4


class Housekeeping:
    """The jobs beside the flush. A session without activity for `session_timeout_s` is marked as timed out."""

    def __init__(
        self,
        scripts: Scripts,
        keys: Keys,
        store: SessionStore,
        postgres: Postgres,
        agents: AgentCopies,
        *,
        session_timeout_s: float,
    ) -> None:
        self._scripts = scripts
        self._keys = keys
        self._store = store
        self._postgres = postgres
        self._agents = agents
        self._session_timeout_s = session_timeout_s
        self._live_cursors = [0] * keys.partitions
        self._log_cursors = [0] * keys.partitions
        self._trimming = 0
        self._timeouts_at = 0.0
        self._idle_after: tuple[datetime, str] | None = None

    async def run_once(self) -> int:
        """One round; how much was done, so that the caller goes on at once while there is more."""
        done = await self.reap() + await self.trim()
        if monotonic() >= self._timeouts_at:
            timed_out = await self.time_out()
            if timed_out < TIMEOUTS_BATCH:
                self._timeouts_at = monotonic() + min(TIMEOUTS_EVERY_S, self._session_timeout_s / 4)
            done += timed_out
        return 1 if done >= TIMEOUTS_BATCH else 0

    async def reap(self) -> int:
        """Lets go of turns whose lease ran out; how many."""
        late = await gather_bounded(self._late(partition) for partition in range(self._keys.partitions))
        reaped = 0
        for session_id in chain.from_iterable(late):
            turn_id = await self._store.reap(session_id)
            if turn_id:
                reaped += 1
                log.warning("turn.reaped", session=masked(session_id), turn_id=turn_id)
        return reaped

    async def _late(self, partition: int) -> list[str]:
        # By this machine's clock only what to look at is chosen; the script decides by Redis' own.
        now_ms = int(time() * 1000)
        key = self._keys.running(partition)
        return [member.decode() for member in await self._scripts.command("ZRANGEBYSCORE", key, "-inf", now_ms + 1000)]

    async def trim(self) -> int:
        """Looks at a part of some lists and takes off sessions that have left Redis, and logs that have; how many."""
        trimmed = 0
        for _ in range(min(TRIM_PARTITIONS, self._keys.partitions)):
            partition = self._trimming
            self._trimming = (partition + 1) % self._keys.partitions
            trimmed += await self._trim_live(partition) + await self._trim_logs(partition)
        return trimmed

    async def _trim_live(self, partition: int) -> int:
        key = self._keys.live(partition)
        cursor, found = await self._scripts.command("ZSCAN", key, self._live_cursors[partition], "COUNT", TRIM_BATCH)
        self._live_cursors[partition] = int(cursor)
        session_ids = [member.decode() for member in found[::2]]
        return await self._trim_off("trim", [key, *map(self._keys.session, session_ids)], session_ids)

    async def _trim_logs(self, partition: int) -> int:
        key = self._keys.logs(partition)
        cursor, found = await self._scripts.command("HSCAN", key, self._log_cursors[partition], "COUNT", TRIM_BATCH)
        self._log_cursors[partition] = int(cursor)
        return await self._trim_off("trim_logs", [key], [session_id.decode() for session_id in found[::2]])

    async def _trim_off(self, script: str, keys: list[str], session_ids: list[str]) -> int:
        if not session_ids:
            return 0
        return int((await self._scripts.run(script, "", keys, {"session_ids": " ".join(session_ids)}))[1])

    async def time_out(self) -> int:
        """Marks idle sessions as timed out, one worker at a time; how many were looked at.

        A round goes on where the one before it stopped, so that sessions which cannot time out do not keep others waiting.
        """
        async with self._postgres.transaction(60) as lock:
            if not (await lock.fetch("try_lock_timeouts"))[0][0]:
                return 0
            # Within this transaction: another connection may not be had.
            hydrator = Hydrator(self._store, lock, self._agents)
            idle = timedelta(seconds=self._session_timeout_s)
            rows = await lock.fetch("idle_sessions", idle, *(self._idle_after or (None, None)), TIMEOUTS_BATCH)
            for row in rows:
                await self._time_out(hydrator, row["session_id"])
        last = rows[-1] if len(rows) == TIMEOUTS_BATCH else None
        self._idle_after = (last["last_activity_at"], last["session_id"]) if last else None
        return len(rows)

    async def _time_out(self, hydrator: Hydrator, session_id: str) -> None:
        # Through Redis, where the truth about the session is: it may be running a turn that Postgres has not heard of.
        idle_ms = int(self._session_timeout_s * 1000)
        try:
            if await hydrator.with_session(session_id, lambda: self._store.time_out(session_id, idle_ms)):
                log.info("session.timed_out", session=masked(session_id))
        except Damaged as error:
            log.error("session.damaged", error=str(error))
