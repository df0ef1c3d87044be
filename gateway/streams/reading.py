"""Reading the log of a turn: from a cursor to the terminal event, as items."""

from collections.abc import AsyncIterator

from gateway.streams.events import HEARTBEAT, SHOWN, TERMINAL, Batch, Cursor, Item
from gateway.streams.log import TurnLog


async def read_log(
    turn_log: TurnLog, cursor: Cursor | None, *, heartbeat_s: float, repeat_end: bool = True
) -> AsyncIterator[Item]:
    """A log from behind a cursor to its terminal event; events that are there at once come in one batch.

    A reader whose cursor is at the end or beyond it gets the terminal event again, unless `repeat_end` is false.
    """
    position = 0 if cursor is None else cursor.number
    if cursor is not None and not turn_log.has_cursor(cursor):
        position = turn_log.first - 1
        yield turn_log.reset(position)
    while True:
        if position + 1 < turn_log.first:
            position, reset = _skip(turn_log, position, repeat_end)
            if reset is not None:
                yield reset
            if position == SHOWN:
                return
        events = turn_log.behind(position)
        if events:
            yield Batch(turn_log.fence, events)
            position = events[-1].number
            if events[-1].kind in TERMINAL:
                return
        elif turn_log.done:
            if repeat_end or position > turn_log.last:
                yield turn_log.repeated_end(position)
            return
        elif turn_log.cut_off:
            return
        elif not await turn_log.changed(heartbeat_s):
            yield HEARTBEAT


def _skip(turn_log: TurnLog, position: int, repeat_end: bool) -> tuple[int, Batch | None]:
    """Where a reader goes on for whom the log no longer has the next event, and the reset that tells it."""
    if turn_log.rebuilt and position == 0:
        # It has seen nothing, and a rebuilt log is the whole turn: nothing is missing.
        return turn_log.first - 1, None
    # A reset sends the reader to the transcript, which has all of a rebuilt log: a feed need not repeat it.
    position = SHOWN if turn_log.rebuilt and not repeat_end else turn_log.first - 1
    return position, turn_log.reset(position)
