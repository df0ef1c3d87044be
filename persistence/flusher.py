"""Flushes records: writes them to Postgres, and only then acknowledges them.

What always holds: a record is acknowledged only after the transaction that wrote it was committed; flushing a record again
changes nothing; an error that is not the data's own leaves the record on the outbox. What Postgres knows better than the
record, Redis is told.
"""

from collections.abc import Sequence
from math import ceil
from time import monotonic

import structlog

from persistence.errors import Damaged, DataRefused, NewerFormat
from persistence.model.codec import decode_record
from persistence.model.fields import SESSION_FIELDS, SessionFields
from persistence.model.ids import masked
from persistence.model.session import Record
from persistence.postgres.postgres import Forgotten, Postgres
from persistence.redis.outbox import Outbox, Taken
from persistence.redis.sessions import SessionStore
from persistence.repair import PLACE_TAKEN, Repair
from persistence.tasks import gather_bounded

log = structlog.get_logger()

PART = 500
"""Records of one transaction."""
FLUSH_TIMEOUT_S = 30.0


class Flusher:
    """Flushes what was taken off an outbox."""

    def __init__(
        self, outbox: Outbox, postgres: Postgres, sessions: SessionStore, fields: SessionFields = SESSION_FIELDS
    ) -> None:
        self._outbox = outbox
        self._postgres = postgres
        self._sessions = sessions
        self._repair = Repair(outbox, postgres, sessions)
        self._fields = fields

    async def flush(self, partition: int, taken: Taken) -> None:
        """Flushes a batch. Raises PostgresUnavailable or RedisUnavailable."""
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
