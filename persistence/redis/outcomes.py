"""What the Redis layer answers."""

from typing import Literal

import msgspec

from persistence.model.session import Message, Session, Turn

Reason = Literal[
    "ended",
    "erased",
    "foreign",
    "unauthorized",
    "backlog_full",
    "queue_full",
    "limited",
    "reused",
]


class Begun(msgspec.Struct):
    """The turn holds the session. `now_ms` is Redis' clock, `history` the messages of the newest turns, oldest first. The
    rate limit is charged for `rate_ahead_ms`: more than its whole time if it would have refused the turn."""

    fence: int
    now_ms: int
    session: Session
    history: list[Message]
    rate_ahead_ms: int = 0


class Replay(msgspec.Struct):
    """This message_id was answered before."""

    session: Session
    number: int
    turn: Turn


class Busy(msgspec.Struct):
    """Turn `turn_id` runs; `same_message` when it answers the very same message_id."""

    lease_left_ms: int
    same_message: bool
    turn_id: str


class Queued(msgspec.Struct):
    """The turn waits at this position, from 1. It keeps its place by asking again within 2 s."""

    position: int


class Absent(msgspec.Struct):
    """Not in Redis. What is read from Postgres from now on may be installed under `ticket`."""

    ticket: int


class Refused(msgspec.Struct):
    """Not allowed, and why. `retry_after_ms` where waiting helps."""

    reason: Reason
    retry_after_ms: int = 0


class Committed(msgspec.Struct):
    message_count: int
    last_activity_at: str


class Opened(msgspec.Struct):
    """A session, and whether this call created it."""

    session: Session
    created: bool


class Hot(msgspec.Struct):
    """A session as Redis has it, with the turns asked for. `ttl_ms` is -1 when it has none, `running` empty when idle."""

    session: Session
    ttl_ms: int
    first_hot: int
    flushed: int
    running: str
    running_fence: int
    first: int
    turns: list[Turn]
