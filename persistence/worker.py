"""The write-behind worker: takes records from the outbox, writes them to Postgres, and only then acknowledges them.

Any number of workers run side by side. What always holds: a record is acknowledged only after the transaction that wrote it
was committed; flushing a record again changes nothing; an error that is not the data's own leaves the record on the outbox.
"""

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic

import structlog

from persistence.errors import PostgresUnavailable, RedisUnavailable
from persistence.flusher import Flusher
from persistence.housekeeping import Housekeeping
from persistence.model.fields import SESSION_FIELDS, SessionFields
from persistence.postgres.postgres import Postgres
from persistence.redis.outbox import CLAIM_IDLE_MS, Outbox
from persistence.redis.partitions import Reached
from persistence.redis.sessions import SessionStore
from persistence.retry import Attempts, Backoff
from persistence.supervisor import told
from persistence.sweep import Sweep
from persistence.tasks import gather_bounded
from persistence.watch import Watch

log = structlog.get_logger()

BATCH = 2000
"""Records taken at once. More would keep Redis from visitors for too long, as would a larger PART."""
IN_HAND = 3
"""Batches of a partition in flight: the next are taken while Postgres writes the first."""
FLUSH_EVERY_S = 0.2
"""From one flush to the next while batches are not full. A transaction costs the same for few records as for many."""
MAX_BACKOFF_S = 2.0
SWEEP_EVERY_S = 2.0
UNHEALTHY = 3
"""Failures of a loop in a row, of kinds that nobody foresees, after which the worker says that it is not healthy."""
CLAIM_EVERY_S = CLAIM_IDLE_MS / 1000 / 2
DRAIN_BACKOFF = Backoff(0.2, 0.2)


class Worker:
    """One worker; it does a round of housekeeping every `housekeep_s` seconds."""

    def __init__(
        self,
        outbox: Outbox,
        postgres: Postgres,
        sessions: SessionStore,
        housekeeping: Housekeeping,
        watch: Watch | None = None,
        sweep: Sweep | None = None,
        *,
        housekeep_s: float = 1.0,
        fields: SessionFields = SESSION_FIELDS,
    ) -> None:
        self._outbox = outbox
        self._flusher = Flusher(outbox, postgres, sessions, fields)
        self.housekeeping = housekeeping
        self._watch = watch
        self._sweep = sweep
        self._housekeep_s = housekeep_s
        self._stopping = asyncio.Event()
        self._claim_at = 0.0

    def stop(self) -> None:
        """Asks the worker to end: `run` returns after the batches in flight."""
        self._stopping.set()

    async def run(self) -> None:
        """Flushes and keeps house until stopped."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._repeat("flush", self._flush_all, FLUSH_EVERY_S))
            tasks.create_task(self._repeat("housekeeping", self._housekeep, self._housekeep_s))
            if self._watch is not None:
                tasks.create_task(self._repeat("watch", self._look_next, 0))
            if self._sweep is not None:
                tasks.create_task(self._repeat("sweep", self._sweep_once, SWEEP_EVERY_S))
        if self._watch is not None:
            self._watch.close()

    async def drain(self, timeout_s: float) -> bool:
        """Flushes until no records are left to take, for up to `timeout_s` seconds; whether it got there."""
        deadline = monotonic() + timeout_s
        attempts = Attempts(DRAIN_BACKOFF)
        while monotonic() < deadline:
            try:
                flushed = await self._flush(lambda: monotonic() < deadline)
                if flushed.unreachable:
                    raise RedisUnavailable(f"{len(flushed.unreachable)} partitions cannot be reached")
                if sum(flushed.results) == 0:
                    return True
            except (RedisUnavailable, PostgresUnavailable) as error:
                log.warning("worker.drain_failed", error=str(error))
                await attempts.pause(error)
        return False

    async def _repeat(self, what: str, work: Callable[[], Awaitable[float]], every_s: float) -> None:
        """Calls `work`, which returns the seconds to pause after it, until the worker is stopped."""
        attempts = Attempts(Backoff(max(every_s, FLUSH_EVERY_S), MAX_BACKOFF_S))
        while not self._stopping.is_set():
            try:
                pause_s = await work()
                attempts.reset()
            except (RedisUnavailable, PostgresUnavailable) as error:
                pause_s = attempts.next_pause_s(error)
                log.warning(f"worker.{what}_failed", error=str(error), retry_in_s=pause_s)
            except Exception as error:
                # Whatever it is, the other loops go on, and so does this one.
                pause_s = attempts.next_pause_s(error)
                log.error("task.failed", task=what, error=told(error), exc_info=True)
                if attempts.failures % UNHEALTHY == 0:
                    log.error("worker.not_healthy", task=what, failures=attempts.failures)
            if pause_s > 0:
                try:
                    await asyncio.wait_for(self._stopping.wait(), pause_s)
                except TimeoutError:
                    continue

    async def _look_next(self) -> float:
        assert self._watch is not None, "only with a watch"
        await self._watch.look_next()
        return 0

    async def _sweep_once(self) -> float:
        assert self._sweep is not None, "only with a sweep"
        await self._sweep.run_once()
        return SWEEP_EVERY_S

    async def _housekeep(self) -> float:
        return 0 if await self.housekeeping.run_once() else self._housekeep_s

    async def _flush_all(self) -> float:
        began = monotonic()
        await self._flush(lambda: not self._stopping.is_set())
        return began + FLUSH_EVERY_S - monotonic()

    async def flush_once(self) -> int:
        """Flushes up to one batch of each partition; the number of records taken."""
        return sum((await self._flush(lambda: False)).results)

    async def _flush(self, go_on: Callable[[], bool]) -> Reached[int]:
        """Flushes each partition that can be reached, batch after batch while they are full and `go_on()`; the numbers of
        records taken. Raises RedisUnavailable when none can be reached, or PostgresUnavailable."""
        claim = monotonic() >= self._claim_at
        if claim:
            self._claim_at = monotonic() + CLAIM_EVERY_S
        return await self._outbox.partitions.each(lambda partition: self._flush_partition(partition, claim, go_on))

    async def _flush_partition(self, partition: int, claim: bool, go_on: Callable[[], bool]) -> int:
        taking = asyncio.Lock()
        after, last = b"0", False

        async def work() -> int:
            """Takes and flushes batch after batch, until one of these loops has taken the last batch or failed."""
            nonlocal after, last
            done = 0
            while True:
                async with taking:
                    if last:
                        return done
                    last = True  # in case `take` raises
                    taken = await self._outbox.take(partition, BATCH, claim=claim and after == b"0", after=after)
                    last = len(taken.entries) < BATCH or not go_on()
                    if taken.entries:
                        after = taken.entries[-1][0]
                try:
                    await self._flusher.flush(partition, taken)
                except BaseException:
                    last = True
                    raise
                done += len(taken.entries)

        # All loops end before an error is raised, so no record is taken again while a transaction still writes it.
        return sum(await gather_bounded(work() for _ in range(IN_HAND)))
