"""Limits that are not about one session: what all pods together have let through, as far as they have told.

Each limit is a key of its own, which goes by itself. Telling is not idempotent: when a reply is lost what was told may be
told again, and a limit is charged for at most one step of its pod too much.
"""

from collections import defaultdict
from collections.abc import Mapping
from typing import NamedTuple

from persistence.errors import PersistenceError
from persistence.redis.connection import gather_bounded
from persistence.redis.keys import Keys
from persistence.redis.scripts import Scripts

AT_ONCE = 500
"""Limits told by one script: some two milliseconds of Redis' time."""


class RateTold(NamedTuple):
    """`cost` turns, each of which takes `interval_ms`; negative: given back."""

    cost: int
    interval_ms: float

    def words(self) -> str:
        return f"rate {self.cost} {self.interval_ms:.6f}"


class DayTold(NamedTuple):
    """`cost` turns of today; negative: given back."""

    cost: int

    def words(self) -> str:
        return f"day {self.cost}"


class RunningTold(NamedTuple):
    """`turns` run on `pod`; nobody counts them any more when it has said nothing for `life_ms`."""

    pod: str
    turns: int
    life_ms: int

    def words(self) -> str:
        return f"running {self.pod} {self.turns} {self.life_ms}"


Told = RateTold | DayTold | RunningTold


class Learned(NamedTuple):
    """What all pods have: of a rate the ms that it is charged beyond now; of a day its turns, and the ms until midnight
    (UTC); of running turns those of other pods."""

    value: int
    left_ms: int


class Limits:
    """The shared limits in Redis."""

    def __init__(self, scripts: Scripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys

    async def tell(self, told: Mapping[str, Told]) -> tuple[dict[str, Learned], PersistenceError | None]:
        """Tells what was let through, by name of the limit, and learns what all pods have: one round trip.

        More than 500 limits, or those of several partitions, are as many calls side by side. Returns what was learned, and
        an error if not all of it could be told.
        """
        by_partition: defaultdict[int, list[str]] = defaultdict(list)
        for name in told:
            by_partition[self._keys.partition(name)].append(name)
        groups = [names[i : i + AT_ONCE] for names in by_partition.values() for i in range(0, len(names), AT_ONCE)]
        learned: dict[str, Learned] = {}
        failures: list[PersistenceError] = []

        async def tell(group: list[str]) -> None:
            keys = [self._keys.limit(name) for name in group]
            try:
                _, *replies = await self._scripts.run("limit", "", keys, {}, rest=[told[name].words() for name in group])
            except PersistenceError as error:
                failures.append(error)
                return
            learned.update((name, Learned(*reply)) for name, reply in zip(group, replies, strict=True))

        await gather_bounded(map(tell, groups))
        return learned, failures[0] if failures else None
