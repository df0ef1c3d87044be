"""The write-behind worker: takes records off the outbox, puts them into Postgres, and only then lets go of them.

Any number of workers run side by side. What always holds: a record is acknowledged after the transaction with it has
been committed; flushing it again changes nothing; an error that is not the data's own leaves everything where it is.
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
from persistence.model.session import Record
from persistence.postgres.postgres import Postgres
from persistence.redis.connection import gather_bounded
from persistence.redis.outbox import CLAIM_IDLE_MS, Outbox, Taken

log = structlog.get_logger()

BATCH = 2000
"""Records taken at once, and `PART` those of one transaction: larger ones would keep Redis from visitors for too long."""
PART = 500
IN_HAND = 3
"""Batches of a partition that are on their way at once: the next ones are taken while Postgres works at one."""
FLUSH_EVERY_S = 0.2
"""A flush begins not sooner after the one before, unless batches are full: a transaction costs the same for few records as
for many, and a record waits a fifth of a second at most."""
MAX_BACKOFF_S = 2.0
FLUSH_TIMEOUT_S = 30.0
CLAIM_EVERY_S = CLAIM_IDLE_MS / 1000 / 2


class Worker:
    """One worker. `housekeep_s` is the pause between two rounds of housekeeping."""

    def __init__(
        self,
        outbox: Outbox,
        postgres: Postgres,
        housekeeping: Housekeeping,
        *,
        housekeep_s: float = 1.0,
        fields: SessionFields = SESSION_FIELDS,
    ) -> None:
        self._fields = fields
        self._outbox = outbox
        self._postgres = postgres
        self._housekeeping = housekeeping
        self._housekeep_s = housekeep_s
        self._stopping = asyncio.Event()
        self._claim_at = 0.0

    def stop(self) -> None:
        """Asks the worker to end: it finishes the batch it has, flushes what is left, and returns."""
        self._stopping.set()

    async def run(self) -> None:
        """Works until stopped."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._repeat("flush", self._flush_all, FLUSH_EVERY_S))
            tasks.create_task(self._repeat("housekeeping", self._housekeep, self._housekeep_s))

    async def drain(self, timeout_s: float) -> bool:
        """Flushes until the outbox has nothing new or the time is over; whether it is empty."""
        deadline = monotonic() + timeout_s
        while monotonic() < deadline:
            try:
                if await self._flush(lambda: monotonic() < deadline) == 0:
                    return True
            except (RedisUnavailable, PostgresUnavailable) as error:
                log.warning("worker.drain_failed", error=str(error))
                await asyncio.sleep(0.2)
        return False

    async def _repeat(self, what: str, work: Callable[[], Awaitable[float]], every_s: float) -> None:
        """Calls `work`, which says how long to pause after it, until the worker is stopped."""
        backoff_s = every_s
        while not self._stopping.is_set():
            try:
                pause_s = await work()
                backoff_s = every_s
            except (RedisUnavailable, PostgresUnavailable) as error:
                log.warning(f"worker.{what}_failed", error=str(error), retry_in_s=backoff_s)
                pause_s = backoff_s
                backoff_s = min(backoff_s * 2, MAX_BACKOFF_S)
            except PersistenceError as error:
                log.error(f"worker.{what}_failed", error=f"{type(error).__name__}: {error}", exc_info=True)
                pause_s = MAX_BACKOFF_S
            if pause_s > 0:
                try:
                    await asyncio.wait_for(self._stopping.wait(), pause_s)
                except TimeoutError:
                    continue

    async def _housekeep(self) -> float:
        return 0 if await self._housekeeping.run_once() else self._housekeep_s

    async def _flush_all(self) -> float:
        began = monotonic()
        await self._flush(lambda: not self._stopping.is_set())
        return began + FLUSH_EVERY_S - monotonic()

    async def flush_once(self) -> int:
        """Flushes up to one batch of each partition; how many records were dealt with."""
        return await self._flush(lambda: False)

    async def _flush(self, go_on: Callable[[], bool]) -> int:
        """Flushes a batch of each partition, and further ones as long as they are full and `go_on` says so."""
        claim = monotonic() >= self._claim_at
        if claim:
            self._claim_at = monotonic() + CLAIM_EVERY_S
        done = await gather_bounded(self._flush_partition(partition, claim, go_on) for partition in self._outbox.partitions)
        return sum(done)

    async def _flush_partition(self, partition: int, claim: bool, go_on: Callable[[], bool]) -> int:
        taking = asyncio.Lock()
        after, last = b"0", False

        async def work() -> int:
            """Takes and flushes one batch after the other, until somebody has taken the last one or has met an error."""
            nonlocal after, last
            done = 0
            while True:
                async with taking:
                    if last:
                        return done
                    last = True  # if this fails
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

        # All of them end before an error is raised: what is taken again is in no transaction any more.
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
        flushed, refused = await self._flush_side_by_side(partition, records)
        log.info(
            "outbox.flushed",
            partition=partition,
            records=flushed,
            refused=refused + len(taken.entries) - len(newer) - len(records),
            duration_ms=round((monotonic() - started) * 1000, 1),
        )

    async def _flush_side_by_side(self, partition: int, records: Sequence[Record]) -> tuple[int, int]:
        """Flushes records in transactions of about PART each, so that Redis, Postgres and this process work at once.

        A session's records are in one of them: none waits for another. Returns how many were flushed and how many refused.
        """
        parts: list[list[Record]] = [[] for _ in range(ceil(len(records) / PART))]
        order: dict[str, int] = {}
        for record in records:
            parts[order.setdefault(record.session.session_id, len(order)) % len(parts)].append(record)
        outcomes = await gather_bounded(self._flush_part(partition, part) for part in parts)
        return sum(flushed for flushed, _ in outcomes), sum(refused for _, refused in outcomes)

    async def _flush_part(self, partition: int, records: Sequence[Record], *, again: bool = False) -> tuple[int, int]:
        """Flushes records in one transaction; on an error of the data halves them until the bad ones stand alone.

        One that stands alone is tried `again` before it is given up: when two workers insert the same new session at the
        same moment, Postgres may refuse one of them for the unique key that ON CONFLICT does not name, and only then.
        Returns how many were flushed and how many refused.
        """
        if not records:
            return 0, 0
        try:
            async with self._postgres.transaction(FLUSH_TIMEOUT_S) as transaction:
                await transaction.flush(records)
        except DataRefused as error:
            if len(records) == 1 and not again:
                return await self._flush_part(partition, records, again=True)
            if len(records) == 1:
                record = records[0]
                await self._outbox.dead_letter(partition, record.entry, record.session.session_id, record.fact, str(error))
                log.error("outbox.dead_letter", partition=partition, entry=record.entry, reason=str(error))
                return 0, 1
            middle = len(records) // 2
            left = await self._flush_part(partition, records[:middle])
            right = await self._flush_part(partition, records[middle:])
            return left[0] + right[0], left[1] + right[1]
        await self._outbox.mark_flushed(partition, records)
        return len(records), 0

    async def _bury(self, partition: int, entry: bytes, fields: Sequence[bytes], reason: str) -> None:
        """Puts a record that cannot be read on the dead stream."""
        named = dict(zip(fields[::2], fields[1::2], strict=False))
        session_id = named.get(b"session_id", b"").decode(errors="replace")
        fact = named.get(b"fact", b"").decode(errors="replace")
        await self._outbox.dead_letter(partition, entry.decode(), session_id, fact, reason)
        log.error("outbox.dead_letter", partition=partition, entry=entry.decode(), reason=reason)
