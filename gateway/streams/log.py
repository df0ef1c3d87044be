"""The log of one turn in memory, and the writer that brings it to Redis."""

import asyncio
from typing import Any

import msgspec
import structlog

from gateway.streams.events import TERMINAL, answer_metadata, turn_started
from persistence.errors import RedisUnavailable
from persistence.model.session import Turn
from persistence.redis.log_entries import Event, Part
from persistence.redis.turn_logs import TurnLogs

_encode = msgspec.json.Encoder().encode

log = structlog.get_logger()

COALESCE_S = 0.04

MAX_EVENTS = 20_000

MAX_BYTES = 1_048_576

REBUILT = 2**40
"""The events of a log that was made anew from the transcript are numbered from behind this: no cursor of the log that was
is taken for one of theirs."""


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

    def __init__(self, logs: TurnLogs, session_id: str, turn_id: str, fence: int) -> None:
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


def end_log(turn_log: TurnLog, turn: Turn, *, replayed: bool) -> None:
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
    end_log(turn_log, turn, replayed=True)
    return turn_log
