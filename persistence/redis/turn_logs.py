"""Turn logs: the events of streamed turns, kept for minutes so that a stream can be resumed on any pod.

Each append publishes a wake-up for readers on other pods (`wakeups.py`), in the same script.
"""

from typing import Any

import msgspec

from persistence.errors import Damaged
from persistence.model.codec import decode_session, decode_turn, unreadable
from persistence.model.ids import masked
from persistence.model.session import Access, Session, Turn
from persistence.redis.keys import Keys
from persistence.redis.log_entries import LOG_TTL_MS, LoggedEvent, Part, log_arguments
from persistence.redis.outcomes import Absent, Reason, Refused
from persistence.redis.scripts import Scripts
from persistence.redis.sessions import TICKET_MS, access_arguments

_decoder = msgspec.json.Decoder(list[tuple[str, msgspec.Raw]])


class Following(msgspec.Struct):
    """The events behind a cursor, and the turn's state: running (`lease_left_ms`), committed (`turn`, `session`) or gone."""

    fence: int
    events: list[LoggedEvent]
    lease_left_ms: int | None = None
    session: Session | None = None
    turn: Turn | None = None

    @property
    def running(self) -> bool:
        return self.lease_left_ms is not None


class TurnLogs:
    """The turn logs in Redis."""

    def __init__(self, scripts: Scripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys

    async def append(self, session_id: str, turn_id: str, fence: int, part: Part) -> int | None:
        """Appends events to the log of a running turn; returns the number of the last event stored, which is below
        `part.after` if Redis lost some. None: the turn was lost. Raises RedisUnavailable."""
        head = self._keys.head(session_id)
        keys = [self._keys.session(session_id), f"{head}logs", self._keys.events(session_id, turn_id)]
        arguments = {"turn_id": turn_id, "fence": fence, **log_arguments(self._keys, session_id, part)}
        match await self._scripts.run("append", session_id, keys, arguments):
            case ["appended"]:
                return part.events[-1].number
            case ["gap", tail]:
                return int(tail)
            case _:
                return None

    async def cancel(self, session_id: str, turn_id: str, access: Access) -> bool | Refused:
        """Cancels a running turn; False when it no longer runs."""
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
        """The events behind the log entry that ends with `after` (fence, number), and the turn's state. Raises Damaged."""
        head = self._keys.head(session_id)
        keys = [
            self._keys.session(session_id),
            self._keys.events(session_id, turn_id),
            f"{head}fence",
            f"{head}ticket:{session_id}",
            f"{head}epoch",
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
                await self._scripts.confirm(keys[0])
                fence, events = _events(entries, where)
                decoded = decode_turn(turn, where, f"t:{number}")
                return Following(fence, events, session=decode_session(header, where, self._scripts.fields), turn=decoded)
            case ["gone", entries]:
                return Following(*_events(entries, where))
            case ["absent", ticket, held]:
                return Absent(ticket, held.decode())
            case [word]:
                return Refused(_reason(word))
        raise Damaged(where, "reply", "of follow")


def _reason(word: str) -> Reason:
    return word  # type: ignore[return-value]  # the scripts' refusals are the type's words


def _events(entries: list[Any], where: str) -> tuple[int, list[LoggedEvent]]:
    """The fence and the events of entries as Redis returns them. Raises Damaged."""
    fence, events = 0, []
    for entry, fields in entries:
        try:
            named = dict(zip(fields[::2], fields[1::2], strict=True))
            fence = int(entry.split(b"-")[0])
            for number, (kind, data) in enumerate(_decoder.decode(named[b"events"]), int(named[b"first"])):
                events.append(LoggedEvent(number, kind, bytes(data)))
        except (KeyError, ValueError, msgspec.DecodeError) as error:
            raise Damaged(where, f"event {entry!r}", unreadable(error)) from error
    return fence, events
