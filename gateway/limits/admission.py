"""What the limits tell a call that they let in."""

from typing import Literal

from gateway.limits.limiter import Admission
from gateway.problems import Problem, RateLimited

__all__ = ["Admission", "Outcome", "Unlimited"]

Outcome = Literal["ran", "repeated", "refused"]


class Unlimited:
    """The admission of a turn that only its session's own limit bounds."""

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
