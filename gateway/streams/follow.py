"""Turns that other pods run, followed through their logs in Redis: once a turn, however many read it here."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Protocol

import structlog

from gateway.problems import Problem, SessionNotFound, TokenRequired
from gateway.streams.events import Cursor, Item
from gateway.streams.log import TurnLog, end_log
from gateway.streams.options import StreamOptions
from gateway.streams.reading import read_log
from persistence.errors import Damaged, PersistenceError
from persistence.model.session import Access
from persistence.redis.keys import Keys
from persistence.redis.outcomes import Hot, Refused
from persistence.redis.sessions import SessionStore
from persistence.redis.turn_logs import Following
from persistence.redis.wakeups import WakeUps
from persistence.retry import Attempts, Backoff

log = structlog.get_logger()

REDIS_AWAY = Backoff(first_s=0.3, most_s=0.3)

LEASE_MARGIN_S = 0.05


class FindsSessions(Protocol):
    """The reads that streams need across Redis and Postgres; an import contract bars them from Postgres itself."""

    async def find_session(self, session_id: str, access: Access, turns: int = 0) -> Hot | Refused | None: ...

    async def find_following(
        self, session_id: str, turn_id: str, access: Access, after: Cursor | None
    ) -> Following | Refused | None: ...


def refusal(found: Refused | None) -> Problem:
    """Why there is nothing to read. A session that is erased or of another website does not exist for the caller."""
    return TokenRequired() if found is not None and found.reason == "unauthorized" else SessionNotFound()


@asynccontextmanager
async def woken(wakeups: WakeUps, channel: str) -> AsyncIterator[asyncio.Event]:
    """An event that is set by every wake-up on a channel, and whenever one may have been missed."""
    news = asyncio.Event()

    def wake(_: str) -> None:
        news.set()

    try:
        await wakeups.subscribe(channel, wake)
        yield news
    finally:
        await wakeups.unsubscribe(channel, wake)


def merge(turn_log: TurnLog, found: Following) -> None:
    """Adds what a reading brought. A turn that is over without a terminal event in its log gets one."""
    if found.fence and not turn_log.fence:
        turn_log.fence = found.fence
    for event in found.events:
        if event.number > turn_log.last:
            turn_log.add(event)
    if turn_log.done or found.running:
        return
    if found.turn is not None:
        end_log(turn_log, found.turn, replayed=False)
    else:
        turn_log.fail()


class FollowedTurn:
    """A turn of another pod, its readers here, and the task that keeps its log up to date while there are any."""

    def __init__(self, turn_log: TurnLog) -> None:
        self.log = turn_log
        self.readers = 0
        self.task: asyncio.Task[None] | None = None


class Follower:
    """Follows turns of other pods. `turns` are those that are read now, by id."""

    def __init__(self, finder: FindsSessions, store: SessionStore, wakeups: WakeUps, keys: Keys) -> None:
        self.turns: dict[str, FollowedTurn] = {}
        self._finder = finder
        self._store = store
        self._wakeups = wakeups
        self._keys = keys
        self._closed = False

    def close(self) -> None:
        """Cuts every stream of a followed turn, now and later: it can be followed on another pod."""
        self._closed = True
        for followed in self.turns.values():
            followed.log.cut()

    async def read(
        self,
        turn_log: TurnLog,
        turn_id: str,
        access: Access,
        cursor: Cursor | None,
        options: StreamOptions,
        *,
        repeat_end: bool,
    ) -> AsyncIterator[Item]:
        """The items of a turn that runs elsewhere; `turn_log` is used unless the turn is followed already."""
        # Everything happens at the first item: a stream that is opened and never read leaves nothing to undo.
        followed = self.turns.setdefault(turn_id, FollowedTurn(turn_log))
        followed.readers += 1
        if self._closed:
            followed.log.cut()
        if followed.task is None:
            followed.task = asyncio.create_task(self._follow(followed.log, turn_id, access, options))
        try:
            async for item in read_log(followed.log, cursor, heartbeat_s=options.heartbeat_s, repeat_end=repeat_end):
                yield item
        finally:
            followed.readers -= 1
            if followed.readers == 0:
                followed.task.cancel()
                del self.turns[turn_id]

    async def _follow(self, turn_log: TurnLog, turn_id: str, access: Access, options: StreamOptions) -> None:
        """Keeps a log up to date until its end; ends it when its turn cannot be read."""
        attempts: Attempts | None = None
        async with woken(self._wakeups, self._keys.channel(turn_log.session_id)) as news:
            while not turn_log.done:
                news.clear()
                try:
                    pause_s: float | None = await self._look(turn_log, turn_id, access, options.poll_s)
                    attempts = None
                except PersistenceError as error:
                    log.warning("stream.follow_failed", turn_id=turn_id, error=str(error))
                    attempts = attempts or Attempts(REDIS_AWAY, deadline_s=monotonic() + options.give_up_s)
                    pause_s = _pause_s(attempts, error)
                    if pause_s is None:
                        turn_log.fail()
                except Exception:
                    log.error("stream.follow_failed", turn_id=turn_id, exc_info=True)
                    # No reader waits for what nobody follows any more.
                    turn_log.fail()
                    raise
                if pause_s and not turn_log.done:
                    await _wait(news, pause_s)

    async def _look(self, turn_log: TurnLog, turn_id: str, access: Access, poll_s: float) -> float:
        """Reads what is new, and frees the session of a turn whose lease has expired; when to look again, in seconds."""
        session_id = turn_log.session_id
        after = Cursor(turn_log.fence, turn_log.last) if turn_log.events else None
        found = await self._finder.find_following(session_id, turn_id, access, after)
        if found is None or isinstance(found, Refused):
            turn_log.fail()
            return 0
        merge(turn_log, found)
        if found.lease_left_ms is None:
            return poll_s
        if not 0 < found.lease_left_ms <= self._store.lease_ms:
            # Over, or longer than any lease: the clock was set back, and reaping shortens it.
            await self._store.reap(session_id)
            return 0 if found.lease_left_ms <= 0 else poll_s
        return min(poll_s, found.lease_left_ms / 1000 + LEASE_MARGIN_S)


def _pause_s(attempts: Attempts, error: PersistenceError) -> float | None:
    """The pause before the next attempt; None when there is none, at once for what no attempt would mend."""
    if isinstance(error, Damaged):
        return None
    try:
        return attempts.next_pause_s(error)
    except PersistenceError:
        return None


async def _wait(news: asyncio.Event, timeout_s: float) -> None:
    try:
        async with asyncio.timeout(timeout_s):
            await news.wait()
    except TimeoutError:
        return
