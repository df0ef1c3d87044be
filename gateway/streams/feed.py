"""The feed of a session: its turns as they happen, whoever began them, for the visitor's other tabs and devices.

The cursor of a feed is that of a turn's event, or (epoch, SHOWN) once that turn was shown to its end."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import structlog

from gateway.problems import Problem, SessionNotFound
from gateway.streams.events import HEARTBEAT, SHOWN, Cursor, Item, reset_at
from gateway.streams.follow import FindsSessions, refusal, woken
from gateway.streams.options import StreamOptions
from persistence.errors import PersistenceError
from persistence.model.session import Access
from persistence.redis.keys import Keys
from persistence.redis.outcomes import Hot
from persistence.redis.wakeups import WakeUps
from persistence.retry import Attempts, Backoff

log = structlog.get_logger()

FAILED = Backoff(first_s=0.5, most_s=0.5)

OpenTurn = Callable[[str, Cursor | None], Awaitable[AsyncIterator[Item]]]
"""Opens a turn of the session, by its id, behind a cursor."""


class Feed:
    """One reader of a session's turns. It ends when `closing` is set or the session is erased."""

    def __init__(
        self,
        session_id: str,
        access: Access,
        cursor: Cursor,
        finder: FindsSessions,
        open_turn: OpenTurn,
        closing: asyncio.Event,
    ) -> None:
        self._session_id = session_id
        self._access = access
        self._cursor = cursor
        self._finder = finder
        self._open_turn = open_turn
        self._closing = closing

    async def read(self, wakeups: WakeUps, keys: Keys, options: StreamOptions) -> AsyncIterator[Item]:
        """The items behind the cursor."""
        async with woken(wakeups, keys.channel(self._session_id)) as news:
            attempts = Attempts(FAILED)
            while not self._closing.is_set():
                news.clear()
                try:
                    async for item in self._catch_up():
                        yield item
                except SessionNotFound:
                    return
                except (Problem, PersistenceError) as error:
                    log.warning("stream.feed_failed", error=str(error))
                    await attempts.pause(error)
                    continue
                if not await _first_of(news, self._closing, options.heartbeat_s):
                    yield HEARTBEAT

    async def _catch_up(self) -> AsyncIterator[Item]:
        """Shows each turn from the cursor on to its end, and moves the cursor behind it."""
        hot = await load_hot(self._finder, self._session_id, self._access, self._cursor.epoch)
        turns = _turns_from(hot, self._cursor.epoch)
        if self._cursor.epoch and all(epoch != self._cursor.epoch for epoch, _ in turns):
            # The turn that the reader was in, or had seen last, is no longer hot, or came back from Postgres, which has no
            # epochs: the transcript tells what became of it, and what may have followed.
            self._cursor = from_now_on(hot)
            yield reset_at(self._cursor)
            turns = [turn for turn in turns if turn[0] > self._cursor.epoch]
        for epoch, turn_id in turns:
            shown = Cursor(epoch, SHOWN)
            if shown == self._cursor:
                continue
            after = self._cursor if epoch == self._cursor.epoch else None
            async for item in await self._open_turn(turn_id, after):
                yield item
            self._cursor = shown


def from_now_on(hot: Hot) -> Cursor:
    """The cursor of a reader that has the transcript. A turn that runs is shown from its start."""
    return Cursor(hot.turns[-1].fence if hot.turns else 0, SHOWN)


async def load_hot(finder: FindsSessions, session_id: str, access: Access, epoch: int) -> Hot:
    """The session with its newest turns, back to that of an epoch: usually one or two of them. Raises a Problem."""
    count = 2
    while True:
        hot = await finder.find_session(session_id, access, count)
        if not isinstance(hot, Hot):
            raise refusal(hot)
        if hot.first <= hot.first_hot or not hot.turns or hot.turns[0].fence <= epoch:
            return hot
        count *= 8


def _turns_from(hot: Hot, epoch: int) -> list[tuple[int, str]]:
    """Epoch and id of the turns from an epoch on, the running one last."""
    turns = [(turn.fence, turn.id) for turn in hot.turns if turn.fence >= epoch]
    if hot.running and hot.running_fence >= epoch:
        turns.append((hot.running_fence, hot.running))
    return turns


async def _first_of(news: asyncio.Event, closing: asyncio.Event, timeout_s: float) -> bool:
    """Waits for either event; False when neither was set in time."""
    waits = {asyncio.ensure_future(news.wait()), asyncio.ensure_future(closing.wait())}
    try:
        done, _ = await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        return bool(done)
    finally:
        for waiting in waits:
            waiting.cancel()
