"""Repair: a turn whose place in Postgres another one has is stored behind the newest, instead of becoming a dead letter.

That happens when turns were committed to a session that Redis had partly forgotten, before anybody noticed, or to one
that two masters had for a while.
"""

from collections.abc import Sequence

import msgspec
import structlog

from persistence.model.ids import masked
from persistence.model.session import Record, Session
from persistence.postgres.postgres import Postgres, Transaction
from persistence.redis.outbox import Outbox
from persistence.redis.sessions import SessionStore

log = structlog.get_logger()

PLACE_TAKEN = frozenset(("idx_messages_session", "idx_sessions_session_id"))
"""The constraints that a turn, or a session, breaks when another one has its place."""

LOCKED_S = 30.0


class Repair:
    """Stores turns behind those that have their places."""

    def __init__(self, outbox: Outbox, postgres: Postgres, sessions: SessionStore) -> None:
        self._outbox = outbox
        self._postgres = postgres
        self._sessions = sessions

    async def store_behind(self, partition: int, record: Record, epoch: int) -> None:
        """Stores all that is on the outbox about the record's session, in its order, and acknowledges it.

        The session is compared with Postgres at its next use, and gets the turns' new numbers then. Raises DataRefused,
        PostgresUnavailable or RedisUnavailable.
        """
        session_id = record.session.session_id
        await self._sessions.doubt(session_id)
        waiting = {one.entry: one for one in await self._outbox.records_of(partition, session_id)} | {record.entry: record}
        records = sorted(waiting.values(), key=_order)
        async with self._postgres.transaction(LOCKED_S) as transaction:
            # No other flush runs beside it: the numbers are this one's.
            await transaction.fetch("lock_erase")
            moved = await _moved(transaction, records)
            await transaction.flush(moved)
            await transaction.mark(partition, epoch, records)
        await self._sessions.doubt(session_id)
        await self._outbox.count(partition, "stored_behind", sum(one.turn is not None for one in moved))
        await self._outbox.mark_flushed(partition, records, epoch)
        facts = [one.fact for one in moved]
        log.warning("outbox.stored_behind", partition=partition, session=masked(session_id), facts=facts)


def _order(record: Record) -> tuple[int, int]:
    milliseconds, _, number = record.entry.partition("-")
    return int(milliseconds), int(number)


async def _moved(transaction: Transaction, records: Sequence[Record]) -> list[Record]:
    """The records that Postgres lacks, as facts about the session that it has, behind its newest turn."""
    stored = await transaction.find_session(records[0].session.session_id)
    if stored is None:
        return list(records)
    ids = [message.id for record in records if record.turn for message in record.turn.messages]
    known = await transaction.stored_messages(ids)
    newest, moved = stored, []
    for record in records:
        turn = record.turn
        if turn is not None and known.isdisjoint(message.id for message in turn.messages):
            newest = _continued(newest, record.session, len(turn.messages))
            turn = msgspec.structs.replace(turn, seq=newest.message_count - len(turn.messages) + 1)
            moved.append(Record(record.entry, f"t:{newest.turns}", newest, turn, record.bytes))
        elif turn is None and not record.fact.startswith("timeout:"):
            # An end or a user is final. That somebody was idle is not: there may be turns since.
            final = {"status": record.session.status, "ended_at": record.session.ended_at} if _ended(record) else {}
            user_id = newest.user_id or record.session.user_id
            newest = msgspec.structs.replace(newest, revision=newest.revision + 1, user_id=user_id, **final)
            moved.append(Record(record.entry, record.fact, newest, None, record.bytes))
    return moved


def _ended(record: Record) -> bool:
    return record.fact.startswith("ended:")


def _continued(stored: Session, with_turn: Session, messages: int) -> Session:
    """A stored session after one more turn, which had been committed to another state of it."""
    return msgspec.structs.replace(
        with_turn,
        id=stored.id,
        status=stored.status if stored.status == "ended" else with_turn.status,
        ended_at=stored.ended_at if stored.status == "ended" else with_turn.ended_at,
        user_id=stored.user_id or with_turn.user_id,
        last_activity_at=max(stored.last_activity_at, with_turn.last_activity_at),
        turns=stored.turns + 1,
        message_count=stored.message_count + messages,
        revision=stored.revision + 1,
    )
