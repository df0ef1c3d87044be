"""The write-behind worker: takes records from the outbox, writes them to Postgres, and only then acknowledges them.

Any number of workers run side by side. What always holds: a record is acknowledged only after the transaction that wrote it
was committed; flushing a record again changes nothing; an error that is not the data's own leaves the record on the outbox.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from math import ceil
from time import monotonic

import structlog

from persistence.errors import Damaged, DataRefused, NewerFormat, PersistenceError, PostgresUnavailable, RedisUnavailable
from persistence.housekeeping import Housekeeping
from persistence.model.codec import decode_record
from persistence.model.fields import SESSION_FIELDS, SessionFields
from persistence.model.ids import masked
from persistence.model.session import Record
from persistence.postgres.postgres import Forgotten, Postgres
from persistence.redis.outbox import CLAIM_IDLE_MS, Outbox, Taken
from persistence.redis.sessions import SessionStore
from persistence.repair import PLACE_TAKEN, Repair
from persistence.retry import Attempts, Backoff
from persistence.tasks import gather_bounded

log = structlog.get_logger()

BATCH = 2000
"""Records taken at once. More would keep Redis from visitors for too long, as would a larger PART."""
PART = 500
"""Records of one transaction."""
IN_HAND = 3
"""Batches of a partition in flight: the next are taken while Postgres writes the first."""
FLUSH_EVERY_S = 0.2
"""From one flush to the next while batches are not full. A transaction costs the same for few records as for many."""
MAX_BACKOFF_S = 2.0
FLUSH_TIMEOUT_S = 30.0
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
        *,
        housekeep_s: float = 1.0,
        fields: SessionFields = SESSION_FIELDS,
    ) -> None:
        self._fields = fields
        self._outbox = outbox
        self._postgres = postgres
        self._sessions = sessions
        self._repair = Repair(outbox, postgres, sessions)
        self.housekeeping = housekeeping
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

    async def drain(self, timeout_s: float) -> bool:
        """Flushes until no records are left to take, for up to `timeout_s` seconds; whether it got there."""
        deadline = monotonic() + timeout_s
        attempts = Attempts(DRAIN_BACKOFF)
        while monotonic() < deadline:
            try:
                if await self._flush(lambda: monotonic() < deadline) == 0:
                    return True
            except (RedisUnavailable, PostgresUnavailable) as error:
                log.warning("worker.drain_failed", error=str(error))
                await attempts.pause(error)
        return False

    async def _repeat(self, what: str, work: Callable[[], Awaitable[float]], every_s: float) -> None:
        """Calls `work`, which returns the seconds to pause after it, until the worker is stopped."""
        attempts = Attempts(Backoff(every_s, MAX_BACKOFF_S))
        while not self._stopping.is_set():
            try:
                pause_s = await work()
                attempts.reset()
            except (RedisUnavailable, PostgresUnavailable) as error:
                pause_s = attempts.next_pause_s(error)
                log.warning(f"worker.{what}_failed", error=str(error), retry_in_s=pause_s)
            except PersistenceError as error:
                log.error(f"worker.{what}_failed", error=f"{type(error).__name__}: {error}", exc_info=True)
                pause_s = MAX_BACKOFF_S
            if pause_s > 0:
                try:
                    await asyncio.wait_for(self._stopping.wait(), pause_s)
                except TimeoutError:
                    continue

    async def _housekeep(self) -> float:
        return 0 if await self.housekeeping.run_once() else self._housekeep_s

    async def _flush_all(self) -> float:
        began = monotonic()
        await self._flush(lambda: not self._stopping.is_set())
        return began + FLUSH_EVERY_S - monotonic()

    async def flush_once(self) -> int:
        """Flushes up to one batch of each partition; the number of records taken."""
        return await self._flush(lambda: False)

    async def _flush(self, go_on: Callable[[], bool]) -> int:
        """Flushes each partition, batch after batch while they are full and `go_on()`; the number of records taken."""
        claim = monotonic() >= self._claim_at
        if claim:
            self._claim_at = monotonic() + CLAIM_EVERY_S
        done = await gather_bounded(self._flush_partition(partition, claim, go_on) for partition in self._outbox.partitions)
        return sum(done)

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
                    await self._flush_batch(partition, taken)
                except BaseException:
                    last = True
                    raise
                done += len(taken.entries)

        # All loops end before an error is raised, so no record is taken again while a transaction still writes it.
        return sum(await gather_bounded(work() for _ in range(IN_HAND)))

    async def _flush_batch(self, partition: int, taken: Taken) -> None:
        if taken.deleted:
            log.error("outbox.deleted_while_pending", partition=partition, entries=len(taken.deleted))
        if not taken.entries:
            return
        started = monotonic()
        records: list[Record] = []
        newer: list[bytes] = []
        for entry, fields in taken.entries:
            try:
                records.append(decode_record(entry, fields, self._fields))
            except NewerFormat:
                newer.append(entry)
            except Damaged as error:
                await self._bury(partition, entry, fields, str(error))
        if newer:
            await self._outbox.leave(partition, newer)
            log.warning(
                "outbox.newer_format", partition=partition, records=len(newer), remedy="run a worker of that version"
            )
        flushed, refused = await self._flush_side_by_side(partition, records, taken.epoch)
        log.info(
            "outbox.flushed",
            partition=partition,
            records=flushed,
            refused=refused + len(taken.entries) - len(newer) - len(records),
            duration_ms=round((monotonic() - started) * 1000, 1),
        )

    async def _flush_side_by_side(self, partition: int, records: Sequence[Record], epoch: int) -> tuple[int, int]:
        """Flushes records in transactions of about PART each, so that Redis, Postgres and this process work at once.

        A session's records stay in one transaction, so none waits for another's lock. Returns the numbers of records flushed
        and refused.
        """
        parts: list[list[Record]] = [[] for _ in range(ceil(len(records) / PART))]
        order: dict[str, int] = {}
        for record in records:
            parts[order.setdefault(record.session.session_id, len(order)) % len(parts)].append(record)
        outcomes = await gather_bounded(self._flush_part(partition, part, epoch) for part in parts)
        return sum(flushed for flushed, _ in outcomes), sum(refused for _, refused in outcomes)

    async def _flush_part(
        self, partition: int, records: Sequence[Record], epoch: int, *, again: bool = False
    ) -> tuple[int, int]:
        """Flushes records in one transaction; bisects them on an error of the data until each bad record is alone.

        A record alone is flushed `again` before it becomes a dead letter: when two workers insert the same new session at
        the same moment, Postgres may refuse one for the unique key that ON CONFLICT does not name. One whose place another
        has is stored behind it. Returns the numbers of records flushed and refused.
        """
        if not records:
            return 0, 0
        try:
            async with self._postgres.transaction(FLUSH_TIMEOUT_S) as transaction:
                forgotten = await transaction.flush(records)
                await transaction.mark(partition, epoch, records)
        except DataRefused as error:
            if len(records) == 1 and not again:
                return await self._flush_part(partition, records, epoch, again=True)
            if len(records) == 1:
                record = records[0]
                if error.constraint in PLACE_TAKEN:
                    try:
                        await self._repair.store_behind(partition, record, epoch)
                    except DataRefused as refused:
                        error = refused
                    else:
                        return 1, 0
                await self._outbox.dead_letter(partition, record.entry, record.session.session_id, record.fact, str(error))
                log.error("outbox.dead_letter", partition=partition, entry=record.entry, reason=str(error))
                return 0, 1
            middle = len(records) // 2
            left = await self._flush_part(partition, records[:middle], epoch)
            right = await self._flush_part(partition, records[middle:], epoch)
            return left[0] + right[0], left[1] + right[1]
        for one in forgotten:
            await self._remind(partition, one)
        await self._outbox.mark_flushed(partition, records, epoch)
        return len(records), 0

    async def _remind(self, partition: int, forgotten: Forgotten) -> None:
        """Tells Redis what it has forgotten of a session. An erased one is erased again."""
        log.warning("session.forgotten", partition=partition, session=masked(forgotten.session_id), what=forgotten.what)
        if forgotten.what != "erased":
            await self._sessions.doubt(forgotten.session_id)
        elif await self._sessions.erase_again(forgotten.session_id, forgotten.id):
            await self._outbox.count(partition, "erased_again", 1)

    async def _bury(self, partition: int, entry: bytes, fields: Sequence[bytes], reason: str) -> None:
        """Moves an unreadable record to the dead letters."""
        named = dict(zip(fields[::2], fields[1::2], strict=False))
        session_id = named.get(b"session_id", b"").decode(errors="replace")
        fact = named.get(b"fact", b"").decode(errors="replace")
        await self._outbox.dead_letter(partition, entry.decode(), session_id, fact, reason)
        log.error("outbox.dead_letter", partition=partition, entry=entry.decode(), reason=reason)
