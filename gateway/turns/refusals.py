"""The refusals of the Redis layer, as the Problems that clients get."""

from typing import NoReturn, TypeVar

from gateway.limits.admission import Admission, Unlimited
from gateway.problems import (
    BacklogFull,
    MessageIdReused,
    QueueFull,
    SessionEnded,
    SessionErased,
    SessionNotFound,
    TokenRequired,
)
from persistence.redis.outcomes import Refused

Found = TypeVar("Found")


def raise_refusal(refused: Refused, admission: Admission | Unlimited | None = None) -> NoReturn:
    """Raises the Problem of a refusal; `admission` words that of the session's own rate limit."""
    match refused.reason:
        case "ended":
            raise SessionEnded
        case "erased":
            raise SessionErased
        case "foreign":
            # To callers it is not bound to, a session does not exist.
            raise SessionNotFound
        case "unauthorized":
            raise TokenRequired
        case "backlog_full":
            raise BacklogFull(retry_after_s=5)
        case "queue_full":
            raise QueueFull(retry_after_s=2)
        case "reused":
            raise MessageIdReused(field="message_id")
        case "limited":
            raise (admission or Unlimited()).limited(refused.retry_after_ms / 1000)


def existing(found: Found | Refused | None) -> Found:
    """What was found of a session. Raises the Problem of a refusal, SessionNotFound for nothing or an erased session."""
    if found is None or (isinstance(found, Refused) and found.reason == "erased"):
        raise SessionNotFound
    if isinstance(found, Refused):
        raise_refusal(found)
    return found
