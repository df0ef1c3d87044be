"""Limits that all pods share: per client address, agent and website domain. Pods sync their counters with Redis.

Each limit is a key of its own, which expires by itself. A sync is not idempotent: after a lost reply it may be repeated, and
then charges a limit for at most one step of that pod too much.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from persistence.errors import PersistenceError
from persistence.redis.keys import Keys
from persistence.redis.scripts import Scripts
from persistence.tasks import gather_bounded

BATCH = 500
"""Limits synced by one script, which takes some two milliseconds of Redis' time."""


class RateUpdate(NamedTuple):
    """Turns charged since the last sync (negative: refunded); each takes `interval_ms` of the rate. Nobody can have charged
    the bucket for longer than `most_ms` ahead."""

    turns: int
    interval_ms: float
    most_ms: float = 86_400_000

    def words(self) -> str:
        return f"rate {self.turns} {self.interval_ms:.6f} {self.most_ms:.0f}"


class DayUpdate(NamedTuple):
    """Turns of today since the last sync (negative: refunded)."""

    turns: int

    def words(self) -> str:
        return f"day {self.turns}"


class RunningUpdate(NamedTuple):
    """Turns that run on `pod` now; they stop counting when it does not sync for `expiry_ms`."""

    pod: str
    turns: int
    expiry_ms: int

    def words(self) -> str:
        return f"running {self.pod} {self.turns} {self.expiry_ms}"


LimitUpdate = RateUpdate | DayUpdate | RunningUpdate


class SharedValue(NamedTuple):
    """A limit over all pods. Rate: milliseconds that it is charged beyond now. Day: its turns, and `left_ms` until midnight
    UTC. Running: turns on the other pods."""

    value: int
    left_ms: int


class SharedLimits:
    """The shared limits in Redis, by name (`address:…`, `agent:…`, `day:…`, see `keys.py`)."""

    def __init__(self, scripts: Scripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys

    async def sync(self, updates: Mapping[str, LimitUpdate]) -> tuple[dict[str, SharedValue], PersistenceError | None]:
        """Applies the updates and returns the new values, by name of the limit: one round trip.

        More than BATCH limits, or limits of several partitions, are as many calls side by side. With an error, values are
        missing for the limits that could not be synced.
        """
        by_partition: defaultdict[int, list[str]] = defaultdict(list)
        for name in updates:
            by_partition[self._keys.partition(name)].append(name)
        batches = [names[i : i + BATCH] for names in by_partition.values() for i in range(0, len(names), BATCH)]
        values: dict[str, SharedValue] = {}
        failures: list[PersistenceError] = []

        async def sync_batch(batch: list[str]) -> None:
            keys = [self._keys.limit(name) for name in batch]
            try:
                _, *replies = await self._scripts.run("limit", "", keys, {}, rest=[updates[name].words() for name in batch])
            except PersistenceError as error:
                failures.append(error)
                return
            values.update((name, SharedValue(*reply)) for name, reply in zip(batch, replies, strict=True))

        await gather_bounded(map(sync_batch, batches))
        return values, failures[0] if failures else None
