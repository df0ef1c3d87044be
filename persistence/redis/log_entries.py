"""Log entries: the stored form of a turn log, a stream whose entries hold several events each (lua/append)."""

import msgspec

from persistence.redis.keys import Keys

LOG_TTL_MS = 300_000
"""Expiry of a turn log after its last entry: for so long a stream can be resumed."""


class LoggedEvent(msgspec.Struct, frozen=True):
    """Event number `n` of a turn, from 1: its kind, and its data as JSON."""

    number: int
    kind: str
    data: bytes


class Part(msgspec.Struct, frozen=True):
    """Events to append to a log that ends at number `after`; entries before `keep_from` may be trimmed.

    The first event need not be `after` + 1: events dropped before they were stored leave a gap in the log.
    """

    after: int
    events: list[LoggedEvent]
    keep_from: int = 1


def log_arguments(keys: Keys, session_id: str, part: Part | None) -> dict[str, str | int | bytes]:
    """The arguments about the log for commit, abort and append. Without a part nothing is logged, but readers are woken."""
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
