"""The log of one turn in memory, and the writer that brings it to Redis.

Numbers in a log have no gaps, and the terminal event is its last. A reader holds a position in the log, which all readers of
the turn share: a slow reader costs no memory, it finds that events were dropped."""

import asyncio

import msgspec
import structlog

from gateway.streams.events import (
    TERMINAL,
    TURN_LOST,
    Batch,
    Cursor,
    Event,
    TextDelta,
    TurnCompleted,
    TurnStarted,
    answer_metadata,
    numbered,
    reset_at,
)
from gateway.streams.options import StreamOptions
from persistence.errors import RedisUnavailable
from persistence.model.session import Turn
from persistence.redis.log_entries import LoggedEvent, Part
from persistence.redis.turn_logs import TurnLogs

log = structlog.get_logger()

REBUILT = 2**40
"""A log that is rebuilt from the transcript numbers its events from behind this, so that no cursor of the original log is
taken for one of these."""

DEFAULTS = StreamOptions()


class TurnLog:
    """The events of one turn, as this pod knows them; the oldest are dropped beyond the bounds of `options`."""

    def __init__(self, session_id: str, fence: int = 0, options: StreamOptions = DEFAULTS) -> None:
        self.session_id = session_id
        self.fence = fence
        self.first = 1
        self.events: list[LoggedEvent] = []
        self.done = False
        self.cut_off = False
        self._options = options
        self._bytes = 0
        self._changed = asyncio.Event()

    @property
    def last(self) -> int:
        """The number of the newest event, 0 before the first."""
        return self.first + len(self.events) - 1

    @property
    def rebuilt(self) -> bool:
        """Whether this log was rebuilt from the transcript."""
        return self.first > REBUILT

    def has_cursor(self, cursor: Cursor) -> bool:
        """Whether a cursor is one of this log's, and not of another epoch or of the turn's original log."""
        return cursor.epoch == self.fence and (cursor.number <= REBUILT or self.rebuilt)

    def add(self, event: LoggedEvent) -> None:
        """Appends an event. One behind a gap drops the events before it."""
        if event.number != self.last + 1:
            self.events, self.first, self._bytes = [], event.number, 0
        self.events.append(event)
        self._bytes += len(event.data)
        if len(self.events) > self._options.max_events or self._bytes > self._options.max_bytes:
            self._drop_half()
        self.done = event.kind in TERMINAL
        self._wake()

    def _drop_half(self) -> None:
        dropped = self.events[: len(self.events) // 2]
        del self.events[: len(dropped)]
        self.first += len(dropped)
        self._bytes -= sum(len(old.data) for old in dropped)

    def fail(self) -> None:
        """Ends the log of a turn that was lost without a terminal event."""
        self.add(numbered(self.last + 1, TURN_LOST))

    def cut(self) -> None:
        """Ends all streams of this log where they are; their readers resume on another pod."""
        self.cut_off = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def behind(self, number: int) -> list[LoggedEvent]:
        """The events after a number that are still here."""
        return self.events[max(0, number + 1 - self.first) :]

    def reset(self, number: int) -> Batch:
        """Tells a reader to begin anew behind a number."""
        return reset_at(Cursor(self.fence, number))

    def repeated_end(self, number: int) -> Batch:
        """The terminal event once more for a reader at a number, or beyond the end: its cursor never goes back."""
        return Batch(self.fence, [msgspec.structs.replace(self.events[-1], number=max(number, self.last))])

    async def changed(self, timeout_s: float) -> bool:
        """Waits for the next change; False when there was none."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return False
        return True


class TurnWriter:
    """Writes the log of a turn that runs here: readers here see an event at once, Redis gets some at a time."""

    def __init__(self, logs: TurnLogs, session_id: str, turn_id: str, fence: int, options: StreamOptions = DEFAULTS) -> None:
        self.log = TurnLog(session_id, fence, options)
        self.has_text = False
        self._logs = logs
        self._session_id = session_id
        self._turn_id = turn_id
        self._coalesce_s = options.coalesce_s
        self._stored = 0
        self._timer: asyncio.TimerHandle | None = None
        self._storing: asyncio.Task[None] | None = None
        self._sealed = False
        self._terminal: LoggedEvent | None = None

    def emit(self, event: Event) -> None:
        """Appends an event. Never waits: Redis gets it within `coalesce_s` and a round trip."""
        if self._sealed:
            return
        self.has_text = self.has_text or event.kind == TextDelta.kind
        self.log.add(numbered(self.log.last + 1, event))
        if self._timer is None and self._storing is None:
            self._start_timer()

    def _start_timer(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(self._coalesce_s, self._start_storing)

    def _start_storing(self) -> None:
        self._timer = None
        self._storing = asyncio.create_task(self._store())

    async def _store(self) -> None:
        part = Part(self._stored, self._unstored(), self.log.first)
        try:
            stored = await self._logs.append(self._session_id, self._turn_id, self.log.fence, part)
        except RedisUnavailable as error:
            log.warning("stream.append_failed", turn_id=self._turn_id, error=str(error))
            stored = self._stored
        except Exception:
            log.error("stream.append_failed", turn_id=self._turn_id, exc_info=True)
            stored = self._stored
        self._storing = None
        if stored is None:
            # The turn has lost its session to another one, and ends by itself when it finds out.
            return
        self._stored = stored
        if not self._sealed and self._stored < self.log.last:
            self._start_timer()

    def _unstored(self) -> list[LoggedEvent]:
        return self.log.behind(self._stored)

    async def seal(self, event: Event) -> Part:
        """Ends the log with a terminal event; what is to be stored together with the turn's end.

        No reader sees the event before `publish`.
        """
        self._sealed = True
        if self._timer is not None:
            self._timer.cancel()
        if self._storing is not None:
            await asyncio.wait({self._storing})
        self._terminal = numbered(self.log.last + 1, event)
        return Part(self._stored, [*self._unstored(), self._terminal], self.log.first)

    def publish(self) -> None:
        """Shows the terminal event to the readers here."""
        if self._terminal is not None and not self.log.done:
            self.log.add(self._terminal)


def end_log(turn_log: TurnLog, turn: Turn, *, replayed: bool) -> None:
    """Appends the events that the log of a committed turn lacks: the end, or all of them when it is empty."""
    text = turn.messages[-1].content
    events: list[Event] = [TurnCompleted(text, answer_metadata(turn, turn_log.session_id, replayed=replayed))]
    number = turn_log.last
    if not turn_log.events:
        turn_log.fence, number = turn_log.fence or turn.fence, REBUILT
        started = TurnStarted(turn.id, turn_log.session_id, turn.messages[0].content, turn.message_id or None)
        events = [started, TextDelta(text), *events]
    for offset, event in enumerate(events, 1):
        turn_log.add(numbered(number + offset, event))


def replay_log(turn: Turn, session_id: str) -> TurnLog:
    """The log of a turn that was answered before."""
    turn_log = TurnLog(session_id)
    end_log(turn_log, turn, replayed=True)
    return turn_log
