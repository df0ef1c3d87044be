"""Streamed turns: their events in memory, as Server-Sent Events, and resumed from any pod.

The pod that runs a turn numbers its events, hands them to its own readers at once and brings them to Redis in the
background, some at a time. Other pods follow that log, once per turn however many read it there. A reader holds a position
in a log that all readers of the turn share, so a slow one costs nothing.

What always holds: numbers have no gaps, and exactly one terminal event ends every stream of a turn. A stream without one
was cut, by the network or because its pod goes away, and is to be resumed."""

import asyncio
from collections.abc import AsyncIterator
from time import monotonic
from typing import Protocol

import msgspec
import structlog

from gateway.problems import Draining, Problem, SessionNotFound, TokenRequired, TurnNotFound
from gateway.streams.events import TERMINAL, Cursor
from gateway.streams.log import REBUILT, TurnLog, end_log
from persistence.errors import Damaged, PersistenceError
from persistence.model.session import Access
from persistence.redis.keys import Keys
from persistence.redis.log_entries import Event
from persistence.redis.outcomes import Hot, Refused
from persistence.redis.turn_logs import Following
from persistence.redis.wakeups import WakeUps

_encode = msgspec.json.Encoder().encode

log = structlog.get_logger()

HEARTBEAT_S = 15.0

LOOK_AGAIN_S = 2.0

GIVE_UP_S = 60.0

HEARTBEAT = b": heartbeat\n\n"

SHOWN = 2**53
"""In the cursor of a feed: the turn was shown to its end."""


class FindsSessions(Protocol):
    """What streams need of whoever can read both stores."""

    async def find_session(self, session_id: str, access: Access, turns: int = 0) -> Hot | Refused | None: ...

    async def find_following(
        self, session_id: str, turn_id: str, access: Access, after: Cursor | None
    ) -> Following | Refused | None: ...


class Reaps(Protocol):
    """What streams need of the Redis layer: letting go of a turn whose lease ran out."""

    async def reap(self, session_id: str) -> str | None: ...


class _Followed:
    """A turn of another pod and its readers here."""

    def __init__(self, turn_log: TurnLog) -> None:
        self.log = turn_log
        self.readers = 0
        self.news = asyncio.Event()
        self.task: asyncio.Task[None] | None = None

    def wake(self, _: str) -> None:
        self.news.set()


class Streams:
    """Every open stream of this pod."""

    def __init__(self, finder: FindsSessions, store: Reaps, wakeups: WakeUps, keys: Keys) -> None:
        self._finder = finder
        self._store = store
        self._wakeups = wakeups
        self._keys = keys
        self._own: dict[str, TurnLog] = {}
        self._followed: dict[str, _Followed] = {}
        self._closing = asyncio.Event()

    def own(self, turn_id: str, turn_log: TurnLog) -> None:
        """Notes a turn that runs here."""
        self._own[turn_id] = turn_log

    def disown(self, turn_id: str) -> None:
        """Forgets a turn that has ended here; who reads its log goes on reading."""
        self._own.pop(turn_id, None)

    def close(self) -> None:
        """Ends the feeds of sessions, which would never end by themselves, and the streams of other pods' turns. Those of
        turns that run here end with their turns."""
        self._closing.set()
        for followed in self._followed.values():
            followed.log.cut()

    async def open_turn(
        self, session_id: str, turn_id: str, access: Access, cursor: Cursor | None, *, repeat_end: bool = True
    ) -> AsyncIterator[bytes]:
        """The events of a turn behind a cursor, as Server-Sent Events. Raises the Problem when there is no such turn."""
        found = await self._finder.find_following(session_id, turn_id, access, None)
        if found is None or isinstance(found, Refused):
            raise _refusal(found)
        # Who comes while the turn runs cannot have seen its end, whatever the number of its last event.
        repeat_end = repeat_end or found.running
        turn_log = self._own.get(turn_id)
        # Who knows the id of another session's turn has no right to it.
        if turn_log is not None and turn_log.session_id == session_id:
            return render(turn_log, cursor, repeat_end=repeat_end)
        if not found.running and found.turn is None and not found.events and cursor is None:
            raise TurnNotFound
        turn_log = TurnLog(session_id, found.fence or (cursor[0] if cursor and found.turn is None else 0))
        self._merge(turn_log, found)
        if turn_log.done:
            return render(turn_log, cursor, repeat_end=repeat_end)
        return self._read(_Followed(turn_log), turn_id, access, cursor, repeat_end)

    async def _read(
        self, followed: _Followed, turn_id: str, access: Access, cursor: Cursor | None, repeat_end: bool
    ) -> AsyncIterator[bytes]:
        # Here and not in `open_turn`: a reader that never begins to read has nothing to undo.
        followed = self._followed.setdefault(turn_id, followed)
        followed.readers += 1
        if self._closing.is_set():
            followed.log.cut()
        if followed.task is None:
            followed.task = asyncio.create_task(self._follow(followed, turn_id, access))
        try:
            async for chunk in render(followed.log, cursor, repeat_end=repeat_end):
                yield chunk
        finally:
            followed.readers -= 1
            if followed.readers == 0:
                followed.task.cancel()
                del self._followed[turn_id]

    async def _follow(self, followed: _Followed, turn_id: str, access: Access) -> None:
        """Keeps the log of another pod's turn up to date until its end."""
        session_id = followed.log.session_id
        channel = self._keys.channel(session_id)
        await self._wakeups.subscribe(channel, followed.wake)
        failing_since: float | None = None
        try:
            while not followed.log.done:
                followed.news.clear()
                pause_s = LOOK_AGAIN_S
                try:
                    after = (followed.log.fence, followed.log.last) if followed.log.events else None
                    found = await self._finder.find_following(session_id, turn_id, access, after)
                    failing_since = None
                    if found is None or isinstance(found, Refused):
                        self._fail(followed.log)
                        return
                    self._merge(followed.log, found)
                    if found.lease_left_ms is not None:
                        if found.lease_left_ms <= 0:
                            await self._store.reap(session_id)
                            continue
                        pause_s = min(pause_s, found.lease_left_ms / 1000 + 0.05)
                except PersistenceError as error:
                    log.warning("stream.follow_failed", turn_id=turn_id, error=str(error))
                    failing_since = failing_since or monotonic()
                    if isinstance(error, Damaged) or monotonic() - failing_since > GIVE_UP_S:
                        self._fail(followed.log)
                        return
                    pause_s = 0.3
                if not followed.log.done:
                    try:
                        async with asyncio.timeout(pause_s):
                            await followed.news.wait()
                    except TimeoutError:
                        continue
        finally:
            await self._wakeups.unsubscribe(channel, followed.wake)

    def _merge(self, turn_log: TurnLog, found: Following) -> None:
        """Adds what is new; when the turn is over without a last word in its log, says how it ended."""
        if found.fence and not turn_log.fence:
            turn_log.fence = found.fence
        for event in found.events:
            if event.n > turn_log.last:
                turn_log.add(event)
        if turn_log.done or found.running:
            return
        if found.turn is not None:
            end_log(turn_log, found.turn, replayed=False)
        else:
            self._fail(turn_log)

    def _fail(self, turn_log: TurnLog) -> None:
        data = {"code": "turn_lost", "title": "The turn ended without an answer", "retryable": True}
        turn_log.add(Event(turn_log.last + 1, "turn.failed", _encode(data)))

    async def open_feed(self, session_id: str, access: Access, cursor: Cursor | None) -> AsyncIterator[bytes]:
        """The turns of a session as they happen, from behind a cursor or from now on."""
        if self._closing.is_set():
            raise Draining(retry_after_s=1)
        hot = await self._hot(session_id, access, 2**53)
        return self._feed(session_id, access, cursor or _from_now_on(hot))

    async def _hot(self, session_id: str, access: Access, fence: int) -> Hot:
        """The session with its newest turns, back to the one begun under `fence`: usually one or two, seldom all."""
        count = 2
        while True:
            hot = await self._finder.find_session(session_id, access, count)
            if not isinstance(hot, Hot):
                raise _refusal(hot)
            if hot.first <= hot.first_hot or not hot.turns or hot.turns[0].fence <= fence:
                return hot
            count *= 8

    async def _feed(self, session_id: str, access: Access, cursor: Cursor) -> AsyncIterator[bytes]:
        news = asyncio.Event()
        channel = self._keys.channel(session_id)

        def wake(_: str) -> None:
            news.set()

        await self._wakeups.subscribe(channel, wake)
        try:
            while not self._closing.is_set():
                news.clear()
                try:
                    hot = await self._hot(session_id, access, cursor[0])
                    turns = [(turn.fence, turn.id) for turn in hot.turns if turn.fence >= cursor[0]]
                    if hot.running and hot.running_fence >= cursor[0]:
                        turns.append((hot.running_fence, hot.running))
                    if cursor[1] != SHOWN and all(fence != cursor[0] for fence, _ in turns):
                        # The turn that the reader was in is not here any more: the transcript tells what became of it.
                        cursor = _from_now_on(hot)
                        yield _reset(*cursor)
                        turns = [turn for turn in turns if turn[0] > cursor[0]]
                    for fence, turn_id in turns:
                        if (fence, SHOWN) == cursor:
                            continue
                        after = cursor if fence == cursor[0] else None
                        async for chunk in await self.open_turn(session_id, turn_id, access, after, repeat_end=False):
                            yield chunk
                        cursor = (fence, SHOWN)
                except SessionNotFound:
                    return
                except (Problem, PersistenceError) as error:
                    log.warning("stream.feed_failed", error=str(error))
                    await asyncio.sleep(0.5)
                    continue
                if not await self._wait(news):
                    yield HEARTBEAT
        finally:
            await self._wakeups.unsubscribe(channel, wake)

    async def _wait(self, news: asyncio.Event) -> bool:
        """Waits for news or for the pod's end; False after the time of a heartbeat."""
        waits = {asyncio.ensure_future(news.wait()), asyncio.ensure_future(self._closing.wait())}
        try:
            done, _ = await asyncio.wait(waits, timeout=HEARTBEAT_S, return_when=asyncio.FIRST_COMPLETED)
            return bool(done)
        finally:
            for waiting in waits:
                waiting.cancel()


def _refusal(found: Refused | None) -> Problem:
    """Why there is nothing to show: from elsewhere, and once erased, a session does not exist."""
    return TokenRequired() if found is not None and found.reason == "unauthorized" else SessionNotFound()


def _from_now_on(hot: Hot) -> Cursor:
    """The cursor of a reader who has the transcript. A turn that runs is shown from its start."""
    return (hot.turns[-1].fence if hot.turns else 0), SHOWN


async def render(turn_log: TurnLog, cursor: Cursor | None, *, repeat_end: bool = True) -> AsyncIterator[bytes]:
    """A log as Server-Sent Events, from behind a cursor to its terminal event.

    A reader whose cursor is at the end, or beyond what was saved, gets the terminal event again, unless `repeat_end` is
    false.
    """
    position = 0
    if cursor is not None:
        position = cursor[1]
        if cursor[0] != turn_log.fence or (position > REBUILT and not turn_log.rebuilt):
            position = turn_log.first - 1
            yield _reset(turn_log.fence, position)
    while True:
        if position + 1 < turn_log.first:
            if turn_log.rebuilt and position and not repeat_end:
                # The transcript, which the reader looks at now, has all that is here.
                yield _reset(turn_log.fence, SHOWN)
                return
            whole, position = position == 0 and turn_log.rebuilt, turn_log.first - 1
            if not whole:
                yield _reset(turn_log.fence, position)
        events = turn_log.behind(position)
        if events:
            yield b"".join(_event(turn_log.fence, event.n, event) for event in events)
            position = events[-1].n
            if events[-1].kind in TERMINAL:
                return
        elif turn_log.done:
            if repeat_end or position > turn_log.last:
                yield _event(turn_log.fence, max(position, turn_log.last), turn_log.events[-1])
            return
        elif turn_log.cut_off:
            return
        elif not await turn_log.changed(HEARTBEAT_S):
            yield HEARTBEAT


def _event(fence: int, n: int, event: Event) -> bytes:
    return b"id: %d-%d\nevent: %b\ndata: %b\n\n" % (fence, n, event.kind.encode(), event.data)


def _reset(fence: int, n: int) -> bytes:
    return b"id: %d-%d\nevent: log.reset\ndata: {}\n\n" % (fence, n)
