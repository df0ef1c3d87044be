"""The outcomes of operations of the Redis layer."""

from enum import Enum
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
    rate limit is charged `rate_ahead_ms` beyond now: more than its whole window if it would have refused the turn."""

    fence: int
    now_ms: int
    session: Session
    history: list[Message]
    rate_ahead_ms: int = 0


class Replay(msgspec.Struct):
    """This message_id was answered before, by turn number `number`."""

    session: Session
    number: int
    turn: Turn


class Busy(msgspec.Struct):
    """Turn `turn_id` runs; `same_message` if it answers the same message_id."""

    lease_left_ms: int
    same_message: bool
    turn_id: str


class Queued(msgspec.Struct):
    """The turn waits at this position, from 1, and keeps it by asking again within 2 s."""

    position: int


class Absent(msgspec.Struct):
    """The session is not in Redis. What is read from Postgres from now on may be installed under `ticket`.

    With an id in `held` it is there, as of an older epoch: Postgres may know something of it that Redis has forgotten.
    """

    ticket: int
    held: str = ""


class Reconciled(Enum):
    """What became of a session of an older epoch that was compared with Postgres: it is current now; Postgres knows more,
    and all that Redis has; Postgres knows something else, and Redis has records on the way there; ask again."""

    KEPT = "kept"
    BEHIND = "behind"
    WAITING = "waiting"
    STALE = "stale"


class Refused(msgspec.Struct):
    """The operation is not allowed. `retry_after_ms` where waiting helps."""

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
    """A session as Redis has it, with some of its turns, the first numbered `first`.

    `ttl_ms` is -1 without a TTL. `first_hot` is the number of the oldest hot turn, `flushed` that of the newest one in
    Postgres. `running` is the id of the running turn, '' when idle.
    """

    session: Session
    ttl_ms: int
    first_hot: int
    flushed: int
    running: str
    running_fence: int
    first: int
    turns: list[Turn]
