"""Refusals by a limit: counted, logged in one line a second, and raised unless the limits are in shadow mode."""

from collections import Counter
from time import monotonic
from typing import Literal

import structlog

from gateway.limits.buckets import Bucket, rate_headers
from gateway.metrics import Metrics
from gateway.problems import Problem, RateLimited
from persistence.model.agents import RateLimit

log = structlog.get_logger()

Mode = Literal["enforce", "shadow", "off"]

LOG_S = 1.0
DETAILS = {
    "address": "too many messages from this address",
    "misses": "too many calls from this address for what is not there",
    "sessions": "too many new sessions from this address",
    "domain": "too many messages from this website",
    "agent": "too many messages to this agent",
    "session": "too many messages in this session",
}
"""What a client is told, by the name of the limit."""


class Refusals:
    """The refusals of one pod. In mode `shadow` they are counted and not raised."""

    def __init__(self, metrics: Metrics, mode: Mode) -> None:
        self.mode = mode
        self._metrics = metrics
        self._unlogged: Counter[str] = Counter()
        self._logged_s = 0.0

    def count(self, name: str) -> None:
        """Counts a refusal by the limit of that name, or one that would have been."""
        self._metrics.limited.labels(name, self.mode).inc()
        self._unlogged[name] += 1

    def refuse(self, name: str, problem: Problem) -> None:
        """Counts a refusal. Raises `problem` when limits are enforced."""
        self.count(name)
        if self.mode == "enforce":
            raise problem

    def has_room(self, name: str, bucket: Bucket, limit: RateLimit, now: float) -> bool:
        """Whether a bucket has room for a turn. Raises RateLimited when it has none and limits are enforced."""
        wait_s = bucket.wait_s(now)
        if wait_s > 1e-6:
            self.refuse(name, rate_limited(name, limit, wait_s))
            return False
        return True

    def log(self) -> None:
        """Writes one line a second at most: a flood of calls must not become a flood of lines."""
        now = monotonic()
        if self._unlogged and now - self._logged_s >= LOG_S:
            log.info("limits.refused", mode=self.mode, **self._unlogged)
            self._unlogged.clear()
            self._logged_s = now


def rate_limited(name: str, limit: RateLimit, wait_s: float) -> RateLimited:
    """The refusal by a rate limit that has room again in `wait_s` seconds."""
    return RateLimited(DETAILS[name], retry_after_s=wait_s, headers=rate_headers([(name, limit, 0, wait_s)]))
