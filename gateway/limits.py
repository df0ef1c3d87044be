"""The limit of turns per client address, shared by all pods without costing a turn a round trip.

Each pod decides by what it knows and tells Redis in the background, several times a second, what it has let through;
the answer is what all pods together have. So a limit can be overrun by what pods let through in that time, and if Redis
cannot be reached each pod goes on with what it knows.
"""

import asyncio
from time import monotonic

import structlog

from gateway.problems import RateLimited
from persistence.errors import RedisUnavailable
from persistence.limits import Limits

log = structlog.get_logger()

SYNC_S = 0.2


class Bucket:
    """One address: charged until `tat_s` (monotonic), of which `unsynced` turns are not in Redis yet."""

    __slots__ = ("tat_s", "unsynced")

    def __init__(self) -> None:
        self.tat_s = 0.0
        self.unsynced = 0


class AddressLimiter:
    """At most `messages` turns in `per_s` seconds from one address; a burst may take all of them at once."""

    def __init__(self, limits: Limits, messages: int, per_s: int) -> None:
        self._limits = limits
        self._interval_s = per_s / messages
        self._per_s = per_s
        self._buckets: dict[str, Bucket] = {}
        self._unsynced: set[str] = set()

    def admit(self, address: str) -> None:
        """Charges a turn to an address. Raises RateLimited; a refused turn costs nothing."""
        now = monotonic()
        bucket = self._buckets.get(address)
        if bucket is None:
            bucket = self._buckets[address] = Bucket()
        tat_s = max(bucket.tat_s, now) + self._interval_s
        wait_s = tat_s - self._per_s - now
        if wait_s > 1e-6:
            raise RateLimited("too many messages from this address", retry_after_s=wait_s)
        bucket.tat_s = tat_s
        bucket.unsynced += 1
        self._unsynced.add(address)

    async def run(self) -> None:
        """Keeps in step with Redis until cancelled."""
        while True:
            await asyncio.sleep(SYNC_S)
            await self.sync()

    async def sync(self) -> None:
        """Tells Redis what was let through; learns what the other pods have; forgets addresses that are not charged."""
        for address in list(self._unsynced):
            bucket = self._buckets[address]
            cost, bucket.unsynced = bucket.unsynced, 0
            self._unsynced.discard(address)
            try:
                ahead_ms = await self._limits.charge(f"address:{address}", cost, self._interval_s * 1000)
            except RedisUnavailable as error:
                log.warning("limits.sync_failed", error=str(error))
                continue
            bucket.tat_s = max(bucket.tat_s, monotonic() + ahead_ms / 1000 + bucket.unsynced * self._interval_s)
        now = monotonic()
        self._buckets = {
            address: bucket for address, bucket in self._buckets.items() if bucket.tat_s > now or address in self._unsynced
        }
