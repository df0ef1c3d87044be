"""The events of a turn's log, as they are stored: a stream whose entries hold some events each (lua/lib/log_tail)."""

import msgspec

from persistence.redis.keys import Keys

LOG_TTL_MS = 300_000


class Event(msgspec.Struct, frozen=True):
    """Event number `n` of a turn: its kind and its data as JSON."""

    n: int
    kind: str
    data: bytes


class Part(msgspec.Struct, frozen=True):
    """Events on their way into a log that has those up to number `after`; those before `keep_from` may be dropped from it.

    They need not follow on `after`: what was dropped here before it was stored is a gap in the log.
    """

    after: int
    events: list[Event]
    keep_from: int = 1


def log_arguments(keys: Keys, session_id: str, part: Part | None) -> dict[str, str | int | bytes]:
    """What commit, abort and append are told of a log; without a part, followers are woken and nothing is logged."""
    channel = keys.channel(session_id)
    if part is None or not part.events:
        return {"channel": channel, "events": "", "after": 0, "first": 0, "last": 0, "keep_from": 0, "log_ttl_ms": 0}
    events = b",".join(b'["%b",%b]' % (event.kind.encode(), event.data) for event in part.events)
    return {
        "channel": channel,
        "events": b"[" + events + b"]",
        "after": part.after,
        "first": part.events[0].n,
        "last": part.events[-1].n,
        "keep_from": part.keep_from,
        "log_ttl_ms": LOG_TTL_MS,
    }
