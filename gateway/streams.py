"""Streamed turns: their events in memory, as Server-Sent Events, and resumed from any pod.

The pod that runs a turn numbers its events, hands them to its own readers at once and brings them to Redis in the
background, some at a time. Other pods follow that log, once per turn however many read it there. A reader holds a position
in a log that all readers of the turn share, so a slow one costs nothing.

What always holds: numbers have no gaps, and exactly one terminal event ends every stream of a turn. A stream without one
was cut, by the network or because its pod goes away, and is to be resumed.
"""

import asyncio
from collections.abc import AsyncIterator
from time import monotonic
from typing import Any, Protocol

import msgspec
import structlog

from gateway.problems import Draining, Problem, SessionNotFound, TokenRequired, TurnNotFound
from persistence.errors import Damaged, PersistenceError, RedisUnavailable
from persistence.events import EventLogs, Following, WakeUps
from persistence.keys import Keys
from persistence.logs import Event, Part
from persistence.records import Turn
from persistence.sessions import Access, Hot, Refused

log = structlog.get_logger()

TERMINAL = frozenset(("turn.completed", "turn.failed", "turn.cancelled"))
COALESCE_S = 0.04
HEARTBEAT_S = 15.0
LOOK_AGAIN_S = 2.0
GIVE_UP_S = 60.0
MAX_EVENTS = 20_000
MAX_BYTES = 1_048_576
HEARTBEAT = b": heartbeat\n\n"
REBUILT = 2**40
"""The events of a log that was made anew from the transcript are numbered from behind this: no cursor of the log that was
is taken for one of theirs."""
SHOWN = 2**53
"""In the cursor of a feed: the turn was shown to its end."""

Cursor = tuple[int, int]

_encode = msgspec.json.Encoder().encode


class TurnLog:
    """The events of one turn, as this pod knows them; the oldest are dropped beyond a bound."""

    def __init__(self, session_id: str, fence: int = 0) -> None:
        self.session_id = session_id
        self.fence = fence
        self.first = 1
        self.events: list[Event] = []
        self.done = False
        self.cut_off = False
        self._bytes = 0
        self._changed = asyncio.Event()

    @property
    def last(self) -> int:
        """The number of the newest event, 0 before the first."""
        return self.first + len(self.events) - 1

    @property
    def rebuilt(self) -> bool:
        """Whether this is the whole turn, made anew from the transcript."""
        return self.first > REBUILT

    def add(self, event: Event) -> None:
        """Adds the next event, or one behind a gap, which drops what was before."""
        if event.n != self.last + 1:
            self.events, self.first, self._bytes = [], event.n, 0
        self.events.append(event)
        self._bytes += len(event.data)
        if len(self.events) > MAX_EVENTS or self._bytes > MAX_BYTES:
            dropped = self.events[: len(self.events) // 2]
            del self.events[: len(dropped)]
            self.first += len(dropped)
            self._bytes -= sum(len(old.data) for old in dropped)
        self.done = event.kind in TERMINAL
        self._wake()

    def cut(self) -> None:
        """Ends the streams of this log where they are; their readers resume on another pod."""
        self.cut_off = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def behind(self, n: int) -> list[Event]:
        """The events after number `n` that are still here."""
        return self.events[max(0, n + 1 - self.first) :]

    async def changed(self, timeout_s: float) -> bool:
        """Waits for the next event; False when none came."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True


class TurnWriter:
    """The log of a turn that this pod runs."""

    def __init__(self, logs: EventLogs, session_id: str, turn_id: str, fence: int) -> None:
        self._logs = logs
        self._session_id = session_id
        self._turn_id = turn_id
        self.log = TurnLog(session_id, fence)
        self.has_text = False
        self._stored = 0
        self._timer: asyncio.TimerHandle | None = None
        self._storing: asyncio.Task[None] | None = None
        self._sealed = False
        self._terminal: Event | None = None

    def emit(self, kind: str, data: Any) -> None:
        """Adds an event: readers here get it at once, Redis within 40 ms. Never waits."""
        if self._sealed:
            return
        self.has_text = self.has_text or kind == "text.delta"
        self.log.add(Event(self.log.last + 1, kind, _encode(data)))
        if self._timer is None and self._storing is None:
            self._timer = asyncio.get_running_loop().call_later(COALESCE_S, self._start_storing)

    def _start_storing(self) -> None:
        self._timer = None
        self._storing = asyncio.create_task(self._store())

    async def _store(self) -> None:
        try:
            stored = await self._logs.append(
                self._session_id, self._turn_id, self.log.fence, Part(self._stored, self._unstored(), self.log.first)
            )
        except RedisUnavailable as error:
            log.warning("stream.append_failed", turn_id=self._turn_id, error=str(error))
            stored = self._stored
        self._storing = None
        if stored is None:
            # The turn was lost to another; its own end will tell.
            return
        self._stored = stored
        if not self._sealed and self._stored < self.log.last:
            self._timer = asyncio.get_running_loop().call_later(COALESCE_S, self._start_storing)

    def _unstored(self) -> list[Event]:
        return self.log.behind(self._stored)

    async def seal(self, kind: str, data: Any) -> Part:
        """Ends the log with a terminal event, which nobody sees before `publish`: what has to be stored with the end."""
        self._sealed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._storing is not None:
            await asyncio.wait({self._storing})
        self._terminal = Event(self.log.last + 1, kind, _encode(data))
        return Part(self._stored, [*self._unstored(), self._terminal], self.log.first)

    def publish(self) -> None:
        """Shows the terminal event to the readers here."""
        if self._terminal is not None and not self.log.done:
            self.log.add(self._terminal)


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
            _end(turn_log, found.turn, replayed=False)
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


def answer_metadata(turn: Turn, session_id: str, *, replayed: bool) -> dict[str, Any]:
    """The metadata of a turn's answer: what the graph returned, and what the gateway adds."""
    return {
        **turn.metadata,
        "session_id": session_id,
        "turn_id": turn.id,
        "message_count": turn.seq + len(turn.messages) - 1,
        "latency_ms": turn.messages[-1].latency_ms,
        "replayed": replayed,
    }


def _refusal(found: Refused | None) -> Problem:
    """Why there is nothing to show: from elsewhere, and once erased, a session does not exist."""
    return TokenRequired() if found is not None and found.reason == "unauthorized" else SessionNotFound()


def _from_now_on(hot: Hot) -> Cursor:
    """The cursor of a reader who has the transcript. A turn that runs is shown from its start."""
    return (hot.turns[-1].fence if hot.turns else 0), SHOWN


def turn_started(turn_id: str, session_id: str, message: str, message_id: str | None) -> dict[str, str]:
    """What `turn.started` says. The message is for who follows the session: the visitor's other devices."""
    said = {"turn_id": turn_id, "session_id": session_id, "message": message}
    return {**said, "message_id": message_id} if message_id else said


def _end(turn_log: TurnLog, turn: Turn, *, replayed: bool) -> None:
    """Adds the events that a committed turn's log lacks."""
    text = turn.messages[-1].content
    metadata = answer_metadata(turn, turn_log.session_id, replayed=replayed)
    events: list[tuple[str, Any]] = [("turn.completed", {"response": text, "metadata": metadata})]
    n = turn_log.last
    if not turn_log.events:
        turn_log.fence, n = turn_log.fence or turn.fence, REBUILT
        data = turn_started(turn.id, turn_log.session_id, turn.messages[0].content, turn.message_id)
        events = [("turn.started", data), ("text.delta", {"text": text}), *events]
    for kind, data in events:
        n += 1
        turn_log.add(Event(n, kind, _encode(data)))


def replay_log(turn: Turn, session_id: str) -> TurnLog:
    """The log of a turn that was answered before."""
    turn_log = TurnLog(session_id)
    _end(turn_log, turn, replayed=True)
    return turn_log


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


def parse_cursor(text: str | None) -> Cursor | None:
    """The cursor of a Last-Event-ID header, `<epoch>-<n>`. Raises ValueError."""
    if not text:
        return None
    epoch, separator, n = text.partition("-")
    if not separator or not epoch.isdecimal() or not n.isdecimal() or len(text) > 40:
        raise ValueError("Last-Event-ID is not <epoch>-<n>")
    return int(epoch), int(n)
