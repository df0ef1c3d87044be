"""The times and bounds of streams, in one object that a pod's streams share."""

import msgspec


class StreamOptions(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds, sizes in events and bytes."""

    heartbeat_s: float = 15.0
    """Longest silence on an open stream; below the idle timeout of usual proxies (60 s)."""

    poll_s: float = 2.0
    """How often another pod's turn is read without a wake-up: wake-ups can be lost."""

    give_up_s: float = 60.0
    """How long Redis may be unreachable before a followed turn is reported as lost."""

    coalesce_s: float = 0.04
    """How long events are collected before they are appended to the log in Redis together."""

    max_events: int = 20_000
    """Events that a log keeps; beyond that the older half is dropped."""

    max_bytes: int = 1_048_576
    """The same in bytes of event data."""
