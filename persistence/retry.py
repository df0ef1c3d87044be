"""The retry rule: how often, until when and after which pause a failed operation is tried again.

Every loop that tries again asks `Attempts`. Which errors may pass, and that repeating the operation is safe, the loop knows.
"""

import asyncio
import random
from time import monotonic

import msgspec


class Backoff(msgspec.Struct, frozen=True):
    """Pauses in seconds: `first_s`, then `factor` times as long each time, `most_s` at most.

    With `jitter` a pause is a random part of that, so that calls that failed together do not come back together
    (exponential backoff with full jitter: AWS Architecture Blog, 2015).
    """

    first_s: float
    most_s: float
    factor: float = 2.0
    jitter: bool = False

    def pause_s(self, failures: int) -> float:
        """The pause after failure number `failures`, from 1."""
        # A float overflows beyond some 1,000 doublings; the longest pause is reached long before.
        longest_s = min(self.first_s * self.factor ** min(failures - 1, 60), self.most_s)
        return random.uniform(0, longest_s) if self.jitter else longest_s  # noqa: S311


class Attempts:
    """The attempts at one operation: up to `limit` retries (None: any number), until `deadline_s` on the monotonic clock."""

    def __init__(self, backoff: Backoff, *, limit: int | None = None, deadline_s: float | None = None) -> None:
        self.failures = 0
        self._backoff = backoff
        self._limit = limit
        self._deadline_s = deadline_s

    def next_pause_s(self, error: Exception) -> float:
        """Counts a failed attempt; returns the pause before the next one. Raises `error` when there is none."""
        self.failures += 1
        pause_s = self._backoff.pause_s(self.failures)
        if self._limit is not None and self.failures > self._limit:
            raise error
        if self._deadline_s is not None and monotonic() + pause_s >= self._deadline_s:
            raise error
        return pause_s

    async def pause(self, error: Exception) -> None:
        """Counts a failed attempt and waits for the next one. Raises `error` when there is none."""
        await asyncio.sleep(self.next_pause_s(error))

    def reset(self) -> None:
        """Notes a success: the next failure counts as the first."""
        self.failures = 0
