"""Every open stream of this pod: of its own turns, of other pods' turns, and the feeds of sessions.

The pod that runs a turn numbers its events, hands them to its own readers at once and appends them to the log in Redis in
the background. Other pods follow that log. Streams are items (streams/events.py); a wire makes bytes of them (api/sse.py).

What always holds: numbers have no gaps, and exactly one terminal event ends the stream of a turn. A stream without one was
cut, by the network or by a pod that stops, and is to be resumed."""

import asyncio
from collections.abc import AsyncIterator

from gateway.problems import Draining, TurnNotFound
from gateway.streams.events import SHOWN, Cursor, Item
from gateway.streams.feed import Feed, from_now_on, load_hot
from gateway.streams.follow import FindsSessions, Follower, merge, refusal
from gateway.streams.log import TurnLog, TurnWriter
from gateway.streams.options import StreamOptions
from gateway.streams.reading import read_log
from persistence.model.session import Access
from persistence.redis.keys import Keys
from persistence.redis.outcomes import Refused
from persistence.redis.sessions import SessionStore
from persistence.redis.turn_logs import Following, TurnLogs
from persistence.redis.wakeups import WakeUps


class Streams:
    """Opens streams. `options` may be replaced: they hold for streams and logs that are opened from then on."""

    def __init__(
        self,
        finder: FindsSessions,
        store: SessionStore,
        logs: TurnLogs,
        wakeups: WakeUps,
        keys: Keys,
        options: StreamOptions | None = None,
    ) -> None:
        self.options = options or StreamOptions()
        self.own: dict[str, TurnLog] = {}
        """The logs of the turns that run here, by the turn's id."""
        self.follower = Follower(finder, store, wakeups, keys)
        self._finder = finder
        self._logs = logs
        self._wakeups = wakeups
        self._keys = keys
        self._closing = asyncio.Event()

    def open_log(self, session_id: str, turn_id: str, fence: int) -> TurnWriter:
        """Opens the log of a turn that runs here, for its readers here and elsewhere; `close_log` undoes it."""
        writer = TurnWriter(self._logs, session_id, turn_id, fence, self.options)
        self.own[turn_id] = writer.log
        return writer

    def close_log(self, turn_id: str) -> None:
        """Forgets a turn that has ended here. Readers that have its log read on to its end."""
        self.own.pop(turn_id, None)

    def close(self) -> None:
        """Ends the feeds, which would never end by themselves, and the streams of other pods' turns. The streams of turns
        that run here end with their turns."""
        self._closing.set()
        self.follower.close()

    def read(self, turn_log: TurnLog, cursor: Cursor | None = None, *, repeat_end: bool = True) -> AsyncIterator[Item]:
        """The items of a log behind a cursor."""
        return read_log(turn_log, cursor, heartbeat_s=self.options.heartbeat_s, repeat_end=repeat_end)

    async def open_turn(
        self, session_id: str, turn_id: str, access: Access, cursor: Cursor | None, *, repeat_end: bool = True
    ) -> AsyncIterator[Item]:
        """The items of a turn behind a cursor. Raises the Problem when there is no such turn.

        A reader that has seen the terminal event already gets it again, unless `repeat_end` is false.
        """
        found = await self._finder.find_following(session_id, turn_id, access, None)
        if found is None or isinstance(found, Refused):
            raise refusal(found)
        # A reader that connects while the turn runs has not seen the terminal event, whatever its cursor's number.
        repeat_end = repeat_end or found.running
        own = self.own.get(turn_id)
        # `access` is to this session alone: knowing the id of another session's turn gives no right to it.
        if own is not None and own.session_id == session_id:
            return self.read(own, cursor, repeat_end=repeat_end)
        if not found.running and found.turn is None and not found.events and cursor is None:
            raise TurnNotFound
        turn_log = TurnLog(session_id, _epoch(found, cursor), self.options)
        merge(turn_log, found)
        if turn_log.done:
            return self.read(turn_log, cursor, repeat_end=repeat_end)
        return self.follower.read(turn_log, turn_id, access, cursor, self.options, repeat_end=repeat_end)

    async def open_feed(self, session_id: str, access: Access, cursor: Cursor | None) -> AsyncIterator[Item]:
        """The turns of a session as they happen, from behind a cursor or from now on. Raises a Problem."""
        if self._closing.is_set():
            raise Draining(retry_after_s=1)
        hot = await load_hot(self._finder, session_id, access, SHOWN)

        async def open_turn(turn_id: str, after: Cursor | None) -> AsyncIterator[Item]:
            return await self.open_turn(session_id, turn_id, access, after, repeat_end=False)

        feed = Feed(session_id, access, cursor or from_now_on(hot), self._finder, open_turn, self._closing)
        return feed.read(self._wakeups, self._keys, self.options)


def _epoch(found: Following, cursor: Cursor | None) -> int:
    """The epoch of a turn's log. Of a log that is gone the cursor alone knows it; a committed turn knows its own."""
    return found.fence or (cursor.epoch if cursor is not None and found.turn is None else 0)
