"""Reads over both stores: transcripts, lists of sessions, totals.

Redis is read first. A turn leaves Redis only after Postgres has it, so Postgres has whatever the first read missed.
"""

from collections import defaultdict
from collections.abc import Callable, Coroutine, Iterable
from itertools import chain
from typing import Any, NamedTuple

import msgspec

from persistence.errors import PostgresUnavailable
from persistence.hydrator import Hydrator
from persistence.model.session import Access, Session, StoredMessage, transcript
from persistence.model.times import moment
from persistence.postgres.postgres import Postgres, SessionFilter
from persistence.redis.keys import Keys
from persistence.redis.outbox import Outbox
from persistence.redis.outcomes import Absent, Hot, Refused
from persistence.redis.partitions import Partitions, Result
from persistence.redis.scripts import Scripts
from persistence.redis.sessions import SessionStore
from persistence.redis.turn_logs import Following, TurnLogs
from persistence.tasks import gather_bounded

ALL_TURNS = 1_000_000_000
COUNTED_ONE_BY_ONE = 10_000
OPERATOR = Access(authorized=True, trusted=True)


class MessagePage(msgspec.Struct):
    """Messages, oldest first. `next_before` is the cursor of the page before them, None on the first page of the session."""

    messages: list[StoredMessage]
    next_before: int | None


class ListedSession(msgspec.Struct):
    """A session in a list; `live` when it is in Redis."""

    session: Session
    live: bool

    @property
    def position(self) -> tuple[str, str]:
        return self.session.last_activity_at, self.session.session_id


class SessionPage(NamedTuple):
    """A page of a list; `partial` when partitions could not be reached: of their sessions only those are listed that
    Postgres has, as it has them."""

    sessions: list[ListedSession]
    partial: bool


class Statistics(msgspec.Struct):
    """Totals. `exact` is False when more than COUNTED_ONE_BY_ONE records wait for Postgres: those are left out then. They
    are `partial` when partitions could not be reached, whose sessions are counted as Postgres has them."""

    total_sessions: int
    active_sessions: int
    messages: int
    exact: bool
    partial: bool


class History:
    """Reads for visitors (`find_…`) and for operators (`list_sessions`, `load_statistics`)."""

    def __init__(
        self,
        scripts: Scripts,
        keys: Keys,
        store: SessionStore,
        logs: TurnLogs,
        postgres: Postgres,
        hydrator: Hydrator,
        outbox: Outbox,
        partitions: Partitions,
    ) -> None:
        self._scripts = scripts
        self._logs = logs
        self._keys = keys
        self._store = store
        self._postgres = postgres
        self._hydrator = hydrator
        self._outbox = outbox
        self._partitions = partitions

    async def find_session(self, session_id: str, access: Access, turns: int = 0) -> Hot | Refused | None:
        """The session with its newest `turns` hot turns, hydrated first if need be. None: in neither store."""
        return await self._hydrator.with_session(session_id, lambda: self._store.read(session_id, access, turns))

    async def find_following(
        self, session_id: str, turn_id: str, access: Access, after: tuple[int, int] | None
    ) -> Following | Refused | None:
        """A turn's events behind the cursor `after` (fence, number), and its state. None: no store has the session."""
        return await self._hydrator.with_session(session_id, lambda: self._logs.follow(session_id, turn_id, access, after))

    async def find_messages(
        self, session_id: str, access: Access, before: int | None, limit: int
    ) -> MessagePage | Refused | None:
        """Up to `limit` messages with numbers below `before` (None: the newest). Raises PostgresUnavailable when Redis has
        none of them."""
        hot = await self.find_session(session_id, access, ALL_TURNS)
        if not isinstance(hot, Hot):
            return hot
        messages = list(chain.from_iterable(transcript(turn, number) for number, turn in enumerate(hot.turns, hot.first)))
        first_hot_seq = messages[0].seq if messages else hot.session.message_count + 1
        if before is None:
            before = hot.session.message_count + 1
        page = [message for message in messages if message.seq < before][-limit:]
        missing = limit - len(page)
        if missing and hot.first > 1:
            try:
                older = await self._postgres.load_messages(hot.session.id, min(before, first_hot_seq), missing)
            except PostgresUnavailable:
                # Redis' part of the page will do; the client asks for the page before it when Postgres is back.
                if not page:
                    raise
                older = []
            page = older + page
        oldest = page[0].seq if page else 1
        return MessagePage(page, oldest if oldest > 1 else None)

    async def list_sessions(self, which: SessionFilter, after: tuple[str, str] | None, limit: int) -> SessionPage:
        """Live and stored sessions by last activity, newest first, behind the position `after` (last_activity_at,
        session_id). Raises PostgresUnavailable, and RedisUnavailable when no partition can be reached."""
        live, partial = await self._live_sessions(which, after, limit)
        stored: list[ListedSession] = []
        position = after
        while len(stored) < limit:
            rows = await self._postgres.list_sessions(which, position, limit)
            in_redis, unreachable = await self._of_sessions((row.session_id for row in rows), self._is_in_redis)
            partial |= unreachable
            stored += [ListedSession(row, False) for row in rows if not in_redis.get(row.session_id)]
            if len(rows) < limit:
                break
            position = (rows[-1].last_activity_at, rows[-1].session_id)
        merged = sorted(live + stored, key=lambda listed: listed.position, reverse=True)
        return SessionPage(merged[:limit], partial)

    async def _of_sessions(
        self, session_ids: Iterable[str], find: Callable[[str], Coroutine[Any, Any, Result]]
    ) -> tuple[dict[str, Result], bool]:
        """What is found of each session, without those on partitions that cannot be reached, and whether there are such."""
        by_partition: defaultdict[int, list[str]] = defaultdict(list)
        for session_id in session_ids:
            by_partition[self._keys.partition(session_id)].append(session_id)

        async def find_all(partition: int) -> list[tuple[str, Result]]:
            ids = by_partition[partition]
            return list(zip(ids, await gather_bounded(map(find, ids)), strict=True))

        found, unreachable = await self._partitions.some(by_partition, find_all)
        return dict(chain.from_iterable(found)), bool(unreachable)

    async def _live_sessions(
        self, which: SessionFilter, after: tuple[str, str] | None, limit: int
    ) -> tuple[list[ListedSession], bool]:
        highest = "+inf"
        if after is not None:
            # Scores are rounded to milliseconds as the text is, so the position's own millisecond is read again.
            highest = str(int(moment(after[0]).timestamp() * 1000))
        lists, unreachable = await self._partitions.each(
            lambda partition: self._live_of_partition(partition, which, after, highest, limit)
        )
        return list(chain.from_iterable(lists)), bool(unreachable)

    async def _live_of_partition(
        self, partition: int, which: SessionFilter, after: tuple[str, str] | None, highest: str, limit: int
    ) -> list[ListedSession]:
        found: list[ListedSession] = []
        offset = 0
        while len(found) < limit:
            window = (highest, "-inf", "LIMIT", offset, limit)
            members: list[bytes] = await self._scripts.command("ZREVRANGEBYSCORE", self._keys.live(partition), *window)
            sessions = await gather_bounded(self._find_live(member.decode()) for member in members)
            listed = [ListedSession(session, True) for session in sessions if session and which.matches(session)]
            found += [one for one in listed if after is None or one.position < after]
            if len(members) < limit:
                break
            offset += limit
        return found

    async def _find_live(self, session_id: str) -> Session | None:
        """The session as an operator sees it, if it is in Redis."""
        hot = await self._store.read(session_id, OPERATOR, any_epoch=True)
        return hot.session if isinstance(hot, Hot) else None

    async def _is_in_redis(self, session_id: str) -> bool:
        """Whether Redis has the session: live, or erased but not yet in Postgres."""
        return not isinstance(await self._store.read(session_id, OPERATOR, any_epoch=True), Absent)

    async def load_statistics(self, agent_id: str | None) -> Statistics:
        """Totals over an agent's sessions (None: all). Raises PostgresUnavailable, and RedisUnavailable when no partition
        can be reached.

        Sessions with records on the outbox are counted from Redis, all others from Postgres.
        """
        waiting, missing = await self._outbox.session_ids(COUNTED_ONE_BY_ONE)
        live, unreachable = await self._of_sessions(waiting or (), self._find_live)
        totals = await self._postgres.totals(agent_id, sorted(live))
        of_agent = [session for session in live.values() if session and agent_id in (None, session.agent_id)]
        return Statistics(
            totals.sessions + len(of_agent),
            totals.active + sum(session.status == "active" for session in of_agent),
            totals.messages + sum(session.message_count for session in of_agent),
            waiting is not None,
            bool(missing) or unreachable,
        )
