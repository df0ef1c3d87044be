"""The log of a turn as Redis stores it: a stream, each of whose entries holds some events (lua/prelude)."""

import msgspec

from persistence.redis.keys import Keys

LOG_TTL_MS = 300_000


class LoggedEvent(msgspec.Struct, frozen=True):
    """A numbered event of a turn: its kind and its data, encoded as JSON. Numbers begin at 1."""

    number: int
    kind: str
    data: bytes


class Part(msgspec.Struct, frozen=True):
    """Events to append to a log whose last event is number `after`; events before `keep_from` may be dropped from it.

    The first of them may be later than `after` + 1: events that were dropped before they were stored leave a gap.
    """

    after: int
    events: list[LoggedEvent]
    keep_from: int = 1


def log_arguments(keys: Keys, session_id: str, part: Part | None) -> dict[str, str | int | bytes]:
    """The arguments about the log of commit, abort and append. Without a part, followers are woken and nothing is logged."""
    channel = keys.channel(session_id)
    if part is None or not part.events:
        return {"channel": channel, "events": "", "after": 0, "first": 0, "last": 0, "keep_from": 0, "log_ttl_ms": 0}
    events = b",".join(b'["%b",%b]' % (event.kind.encode(), event.data) for event in part.events)
    return {
        "channel": channel,
        "events": b"[" + events + b"]",
        "after": part.after,
        "first": part.events[0].number,
        "last": part.events[-1].number,
        "keep_from": part.keep_from,
        "log_ttl_ms": LOG_TTL_MS,
    }
