"""Reading the log of a turn: from a cursor to the terminal event, as items."""

from collections.abc import AsyncIterator

import msgspec

from gateway.streams.events import HEARTBEAT, TERMINAL, Cursor, Item
from gateway.streams.log import TurnLog


async def read_log(
    turn_log: TurnLog, cursor: Cursor | None, *, heartbeat_s: float, repeat_end: bool = True
) -> AsyncIterator[Item]:
    """A log from behind a cursor to its terminal event; events that are there at once come in one batch.

    A reader whose cursor is at the end or beyond it gets the terminal event again, unless `repeat_end` is false.
    """
    position = 0
    if cursor is not None:
        position = cursor.number
        if not turn_log.has_cursor(cursor):
            position = turn_log.first - 1
            yield turn_log.reset(position)
    while True:
        if position + 1 < turn_log.first:
            # Events were dropped that this reader has not seen.
            if turn_log.rebuilt and position and not repeat_end:
                # The reader of a feed, who now looks at the transcript: all of the rebuilt log is in it.
                yield turn_log.shown()
                return
            whole, position = position == 0 and turn_log.rebuilt, turn_log.first - 1
            if not whole:
                yield turn_log.reset(position)
        events = turn_log.behind(position)
        if events:
            yield turn_log.batch(events)
            position = events[-1].number
            if events[-1].kind in TERMINAL:
                return
        elif turn_log.done:
            if repeat_end or position > turn_log.last:
                # Numbered so that the reader's cursor never goes back.
                yield turn_log.batch([msgspec.structs.replace(turn_log.events[-1], number=max(position, turn_log.last))])
            return
        elif turn_log.cut_off:
            return
        elif not await turn_log.changed(heartbeat_s):
            yield HEARTBEAT
