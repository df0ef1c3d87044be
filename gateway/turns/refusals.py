"""The refusals of the Redis layer, as the Problems that clients get."""

from typing import Literal, NoReturn, Protocol, TypeVar

from gateway.problems import (
    BacklogFull,
    MessageIdReused,
    Problem,
    QueueFull,
    RateLimited,
    SessionEnded,
    SessionErased,
    SessionNotFound,
    TokenRequired,
)
from persistence.redis.outcomes import Refused

Found = TypeVar("Found")

Outcome = Literal["ran", "repeated", "refused"]


class Admission(Protocol):
    """What turns need of whoever limits them: a turn that was let in, and what it holds and costs."""

    @property
    def mode(self) -> Literal["enforce", "shadow", "off"]: ...

    async def hold(self) -> None: ...

    def let_go(self) -> None: ...

    def began(self, session_ahead_ms: int) -> None: ...

    def limited(self, wait_s: float) -> Problem: ...

    def reserve_session(self) -> None: ...

    def session_created(self, created: bool) -> None: ...

    def settle(self, outcome: Outcome) -> None: ...


class Unlimited:
    """The admission of a turn that nobody limits, but its session itself."""

    mode: Literal["enforce", "shadow", "off"] = "enforce"

    async def hold(self) -> None:
        """Anybody may run."""

    def let_go(self) -> None:
        """Nothing is held."""

    def began(self, session_ahead_ms: int) -> None:
        """Nobody asks."""

    def limited(self, wait_s: float) -> Problem:
        return RateLimited("too many messages in this session", retry_after_s=wait_s)

    def reserve_session(self) -> None:
        """Anybody may create one."""

    def session_created(self, created: bool) -> None:
        """Nothing was charged."""

    def settle(self, outcome: Outcome) -> None:
        """Nothing was charged."""


def raise_refusal(refused: Refused, admission: Admission | None = None) -> NoReturn:
    """Raises the Problem that a refusal of the Redis layer is to a client."""
    match refused.reason:
        case "ended":
            raise SessionEnded
        case "erased":
            raise SessionErased
        case "foreign":
            # From elsewhere it does not exist.
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
    """What was found of a session. Raises the Problem that stands for it otherwise; an erased one does not exist."""
    if found is None or (isinstance(found, Refused) and found.reason == "erased"):
        raise SessionNotFound
    if isinstance(found, Refused):
        raise_refusal(found)
    return found
