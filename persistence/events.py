"""The logs of streamed turns, and the wake-ups that tell readers on other pods of something new.

A log is what a turn has streamed so far, for minutes. What is published carries no data, only the id of the turn that has
something new: a wake-up that is lost costs time, never an event, for readers look again by themselves.
"""

import asyncio
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
from redis.asyncio import RedisCluster
from redis.exceptions import RedisError

from persistence.connection import Client
from persistence.errors import Damaged
from persistence.keys import Keys, masked
from persistence.logs import LOG_TTL_MS, Event, Part, log_arguments
from persistence.records import Session, Turn, decode_session, decode_turn, unreadable
from persistence.scripts import Scripts
from persistence.sessions import TICKET_MS, Absent, Access, Reason, Refused, access_arguments

log = structlog.get_logger()

_decoder = msgspec.json.Decoder(list[tuple[str, msgspec.Raw]])


class Following(msgspec.Struct):
    """A log behind a cursor, and how its turn stands: running (`lease_left_ms`), committed (`turn`, `session`) or gone."""

    fence: int
    events: list[Event]
    lease_left_ms: int | None = None
    session: Session | None = None
    turn: Turn | None = None

    @property
    def running(self) -> bool:
        return self.lease_left_ms is not None


class EventLogs:
    """The logs in Redis."""

    def __init__(self, scripts: Scripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys

    async def append(self, session_id: str, turn_id: str, fence: int, part: Part) -> int | None:
        """Appends events; the number of the last event stored, which is lower when Redis lost some; None: turn is lost."""
        head = self._keys.head(session_id)
        keys = [self._keys.session(session_id), f"{head}logs", self._keys.events(session_id, turn_id)]
        arguments = {"turn_id": turn_id, "fence": fence, **log_arguments(self._keys, session_id, part)}
        match await self._scripts.run("append", session_id, keys, arguments):
            case ["appended"]:
                return part.events[-1].n
            case ["gap", tail]:
                return int(tail)
            case _:
                return None

    async def cancel(self, session_id: str, turn_id: str, access: Access) -> bool | Refused:
        """Cancels a running turn; False when it does not run any more."""
        head = self._keys.head(session_id)
        keys = [self._keys.session(session_id), f"{head}running", f"{head}logs", self._keys.events(session_id, turn_id)]
        arguments = {
            "turn_id": turn_id,
            **access_arguments(access),
            "log_ttl_ms": LOG_TTL_MS,
            "channel": self._keys.channel(session_id),
            "control": self._keys.control,
        }
        reply = await self._scripts.run("cancel", session_id, keys, arguments)
        return reply[0] == "cancelled" if reply[0] in ("cancelled", "lost") else Refused(_reason(reply[0]))

    async def follow(
        self, session_id: str, turn_id: str, access: Access, after: tuple[int, int] | None = None
    ) -> Following | Absent | Refused:
        """A turn's events behind the entry whose last event is `after` (fence, number), and how the turn stands."""
        head = self._keys.head(session_id)
        keys = [
            self._keys.session(session_id),
            self._keys.events(session_id, turn_id),
            f"{head}fence",
            f"{head}ticket:{session_id}",
        ]
        arguments = {
            "turn_id": turn_id,
            **access_arguments(access),
            "after": "-" if after is None else f"{after[0]}-{after[1]}",
            "ticket_ms": TICKET_MS,
        }
        where = f"session {masked(session_id)}"
        match await self._scripts.run("follow", session_id, keys, arguments):
            case ["running", fence, entries, lease_left_ms]:
                return Following(int(fence), _events(entries, where)[1], lease_left_ms=int(lease_left_ms))
            case ["committed", number, entries, header, turn]:
                fence, events = _events(entries, where)
                decoded = decode_turn(turn, where, f"t:{number}")
                return Following(fence, events, session=decode_session(header, where), turn=decoded)
            case ["gone", entries]:
                return Following(*_events(entries, where))
            case ["absent", ticket]:
                return Absent(ticket)
            case [word]:
                return Refused(_reason(word))
        raise Damaged(where, "reply", "of follow")


def _reason(word: str) -> Reason:
    return word  # type: ignore[return-value]  # the scripts' refusals are the type's words


def _events(entries: list[Any], where: str) -> tuple[int, list[Event]]:
    """The fence and the events of log entries. Raises Damaged."""
    fence, events = 0, []
    for entry, fields in entries:
        try:
            named = dict(zip(fields[::2], fields[1::2], strict=True))
            fence = int(entry.split(b"-")[0])
            for n, (kind, data) in enumerate(_decoder.decode(named[b"events"]), int(named[b"first"])):
                events.append(Event(n, kind, bytes(data)))
        except (KeyError, ValueError, msgspec.DecodeError) as error:
            raise Damaged(where, f"event {entry!r}", unreadable(error)) from error
    return fence, events


Callback = Callable[[str], None]


class WakeUps:
    """One subscription connection per pod, whatever it serves. `run` keeps it going."""

    def __init__(self, client: Client, keys: Keys) -> None:
        self._client = client
        self._control = keys.control
        self._callbacks: dict[str, list[Callback]] = {}
        self._pubsub: Any = None

    async def subscribe(self, channel: str, callback: Callback) -> None:
        """Calls `callback` with what is published, and with '' whenever something may have been missed."""
        callbacks = self._callbacks.setdefault(channel, [])
        callbacks.append(callback)
        if len(callbacks) == 1 and self._pubsub is not None:
            try:
                await self._pubsub.subscribe(channel)
            except (OSError, RedisError) as error:
                # The loop that reads meets the same fault, connects anew and subscribes to everything.
                log.warning("wakeups.subscribe_failed", error=str(error))

    async def unsubscribe(self, channel: str, callback: Callback) -> None:
        """Undoes one `subscribe`."""
        callbacks = self._callbacks[channel]
        callbacks.remove(callback)
        if not callbacks:
            del self._callbacks[channel]
            if self._pubsub is not None:
                try:
                    await self._pubsub.unsubscribe(channel)
                except (OSError, RedisError) as error:
                    log.warning("wakeups.unsubscribe_failed", error=str(error))

    async def run(self, on_control: Callback) -> None:
        """Reads until cancelled; connects again after every fault."""
        await self.subscribe(self._control, on_control)
        while True:
            try:
                await self._read()
            except Exception as error:
                # Of any kind: redis-py takes apart whatever comes, and what is no message ends in whatever error it may.
                log.warning("wakeups.failed", error=type(error).__name__)
                await asyncio.sleep(0.2)

    async def _read(self) -> None:
        # On Redis Cluster any node will do: what is published on one is heard on all.
        if isinstance(self._client, RedisCluster):
            await self._client.initialize()
        pubsub = self._client.pubsub()
        try:
            channels = set(self._callbacks)
            await pubsub.subscribe(*channels)
            # Known to others only now: two first subscriptions at once would take two connections, one of them unread.
            self._pubsub = pubsub
            if late := self._callbacks.keys() - channels:
                await pubsub.subscribe(*late)
            while True:
                message = await pubsub.get_message(timeout=10)
                if message is None:
                    await pubsub.ping()
                    continue
                if message["type"] in ("subscribe", "message"):
                    # A (re)subscription tells that something may have been missed before it.
                    text = message["data"].decode() if message["type"] == "message" else ""
                    for callback in list(self._callbacks.get(message["channel"].decode(), ())):
                        callback(text)
        finally:
            self._pubsub = None
            await pubsub.aclose()  # type: ignore[no-untyped-call]
