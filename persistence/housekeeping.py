"""The worker's periodic jobs: time-outs, retention, reaping the turns of dead pods, trimming lists.

Each job may run in several workers at once, and may be repeated. What is on a partition that cannot be reached is passed
over until a later round.
"""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable
from datetime import datetime, timedelta
from functools import partial
from time import monotonic, time
from uuid import UUID

import structlog

from persistence.errors import Damaged
from persistence.hydrator import FindsAgents, Hydrator
from persistence.model.ids import masked
from persistence.postgres.postgres import Postgres, Transaction
from persistence.redis.keys import Keys
from persistence.redis.partitions import Partitions, Result
from persistence.redis.scripts import Scripts
from persistence.redis.sessions import SessionStore

log = structlog.get_logger()

TIMEOUTS_BATCH = 100
TIMEOUTS_EVERY_S = 15.0
RETENTION_BATCH = 100
RETENTION_EVERY_S = 60.0
TRIM_BATCH = 500
TRIM_PARTITIONS = 4


class Housekeeping:
    """The jobs beside the flush. A session times out after `session_timeout_s` seconds without activity."""

    def __init__(
        self,
        scripts: Scripts,
        keys: Keys,
        store: SessionStore,
        postgres: Postgres,
        agents: FindsAgents,
        partitions: Partitions,
        *,
        session_timeout_s: float,
    ) -> None:
        self._scripts = scripts
        self._keys = keys
        self._store = store
        self._postgres = postgres
        self._agents = agents
        self._partitions = partitions
        self._unreachable: set[int] = set()
        self._session_timeout_s = session_timeout_s
        self._live_cursors = [0] * keys.partitions
        self._log_cursors = [0] * keys.partitions
        self._trimming = 0
        self._timeouts_at = 0.0
        self._idle_after: tuple[datetime, str] | None = None
        self._retention_at = 0.0
        self._old_after: dict[UUID, tuple[datetime, str]] = {}

    async def run_once(self) -> int:
        """One round; 1 when the next should follow at once because batches were full, else 0. Raises RedisUnavailable when
        no partition can be reached."""
        self._unreachable.clear()
        done = await self.reap() + await self.trim()
        if monotonic() >= self._timeouts_at:
            timed_out = await self.time_out()
            if timed_out < TIMEOUTS_BATCH:
                self._timeouts_at = monotonic() + min(TIMEOUTS_EVERY_S, self._session_timeout_s / 4)
            done += timed_out
        if monotonic() >= self._retention_at:
            looked_at = await self.retain()
            if looked_at < RETENTION_BATCH:
                self._retention_at = monotonic() + RETENTION_EVERY_S
            done += looked_at
        if self._unreachable:
            log.warning("housekeeping.partitions_unreachable", partitions=len(self._unreachable))
        return 1 if done >= TIMEOUTS_BATCH else 0

    async def reap(self) -> int:
        """Reaps turns whose lease expired; how many. Raises RedisUnavailable when no partition can be reached."""
        reached = await self._partitions.each(self._reap)
        self._unreachable.update(reached.unreachable)
        return sum(reached.results)

    async def _reap(self, partition: int) -> int:
        reaped = 0
        for session_id in await self._late(partition):
            turn_id = await self._store.reap(session_id)
            if turn_id:
                reaped += 1
                log.warning("turn.reaped", session=masked(session_id), turn_id=turn_id)
        return reaped

    async def _late(self, partition: int) -> list[str]:
        # This machine's clock only chooses candidates; the script decides by Redis' clock.
        now_ms = int(time() * 1000)
        key = self._keys.running(partition)
        return [member.decode() for member in await self._scripts.command("ZRANGEBYSCORE", key, "-inf", now_ms + 1000)]

    async def trim(self) -> int:
        """Scans the next part of some partitions' lists for sessions and turn logs that have left Redis; removes these
        entries and returns their number."""
        count = min(TRIM_PARTITIONS, self._keys.partitions)
        which = [(self._trimming + number) % self._keys.partitions for number in range(count)]
        self._trimming = (self._trimming + count) % self._keys.partitions
        return sum(await self._on(which, self._trim))

    async def _on(self, which: Iterable[int], work: Callable[[int], Awaitable[Result]], at_once: int = 32) -> list[Result]:
        """What comes of those of some partitions that can be reached."""
        reached = await self._partitions.some(which, work, at_once)
        self._unreachable.update(reached.unreachable)
        return reached.results

    async def _trim(self, partition: int) -> int:
        return await self._trim_live(partition) + await self._trim_logs(partition)

    async def _one_by_one(self, session_ids: Iterable[str], work: Callable[[str], Awaitable[bool]]) -> int:
        """Works on sessions one after the other, for there is one transaction for all; how many times it came to something.
        Those that cannot be reached are passed over."""
        by_partition: defaultdict[int, list[str]] = defaultdict(list)
        for session_id in session_ids:
            by_partition[self._keys.partition(session_id)].append(session_id)

        async def work_on(partition: int) -> int:
            return sum([await work(session_id) for session_id in by_partition[partition]])

        return sum(await self._on(by_partition, work_on, at_once=1))

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
        """Times out idle sessions, one worker at a time; how many were looked at.

        A round resumes where the last one stopped, so that sessions that cannot time out do not hold up the others.
        """
        async with self._postgres.transaction(60) as lock:
            if not (await lock.fetch("try_lock_timeouts"))[0][0]:
                return 0
            # Hydrates within this transaction: the pool may have no other connection.
            hydrator = Hydrator(self._store, lock, self._agents)
            idle = timedelta(seconds=self._session_timeout_s)
            rows = await lock.fetch("idle_sessions", idle, *(self._idle_after or (None, None)), TIMEOUTS_BATCH)
            await self._one_by_one((row["session_id"] for row in rows), partial(self._time_out, hydrator))
        last = rows[-1] if len(rows) == TIMEOUTS_BATCH else None
        self._idle_after = (last["last_activity_at"], last["session_id"]) if last else None
        return len(rows)

    async def _time_out(self, hydrator: Hydrator, session_id: str) -> bool:
        # Through Redis, which owns the session: it may run a turn that Postgres does not know of.
        idle_ms = int(self._session_timeout_s * 1000)
        try:
            timed_out = await hydrator.with_session(session_id, lambda: self._store.time_out(session_id, idle_ms))
        except Damaged as error:
            log.error("session.damaged", error=str(error))
            return False
        if timed_out:
            log.info("session.timed_out", session=masked(session_id))
        return bool(timed_out)

    async def retain(self) -> int:
        """Erases sessions idle for longer than their agent's `retention_days`, one worker at a time; the largest number
        looked at for one agent.

        A round resumes where the last one stopped, as with time-outs. Erased sessions leave Postgres through the outbox.
        """
        looked_at = [0]
        async with self._postgres.transaction(60) as lock:
            if not (await lock.fetch("try_lock_retention"))[0][0]:
                return 0
            agents = await lock.fetch("list_retentions")
            self._old_after = {row["id"]: self._old_after[row["id"]] for row in agents if row["id"] in self._old_after}
            for row in agents:
                looked_at.append(await self._retain(lock, row["id"], row["name"], timedelta(days=row["days"])))
        return max(looked_at)

    async def _retain(self, lock: Transaction, agent_id: UUID, name: str, kept_for: timedelta) -> int:
        after = self._old_after.pop(agent_id, None) or (None, None)
        rows = await lock.fetch("old_sessions", agent_id, kept_for, *after, RETENTION_BATCH)
        hydrator = Hydrator(self._store, lock, self._agents)
        erase = partial(self._erase, hydrator, str(agent_id), kept_for)
        erased = await self._one_by_one((row["session_id"] for row in rows), erase)
        if len(rows) == RETENTION_BATCH:
            self._old_after[agent_id] = (rows[-1]["last_activity_at"], rows[-1]["session_id"])
        if erased:
            log.info("retention.erased", agent=name, sessions=erased, kept=len(rows) - erased)
        return len(rows)

    async def _erase(self, hydrator: Hydrator, agent_id: str, kept_for: timedelta, session_id: str) -> bool:
        # Through Redis, as when an operator erases it: its records on the outbox go too, and a session active again stays.
        idle_ms = int(kept_for.total_seconds() * 1000)
        try:
            return bool(
                await hydrator.with_session(session_id, lambda: self._store.erase_idle(session_id, agent_id, idle_ms))
            )
        except Damaged as error:
            log.error("session.damaged", error=str(error))
            return False
