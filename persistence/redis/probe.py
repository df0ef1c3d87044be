"""The probe of readiness: a small write, for a server that answers may yet take none."""

import random
from time import monotonic

from persistence.errors import PersistenceError
from persistence.redis.keys import Keys
from persistence.redis.scripts import Scripts
from persistence.tasks import gather_bounded

FRESH_S = 1.0
"""How long an outcome is good for, so that balancers may ask as often as they like."""
AT_ONCE = 3
"""Partitions of a cluster that are tried: a pod is of use as long as one of them takes writes."""
LIFE_MS = 10_000


class Probe:
    """Tries writes, once a second at most."""

    def __init__(self, scripts: Scripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys
        self._tried_at = -FRESH_S
        self._error: PersistenceError | None = None

    async def check(self) -> None:
        """Raises RedisUnavailable or CommandRefused when no turn is possible."""
        if monotonic() - self._tried_at >= FRESH_S:
            partitions = random.sample(range(self._keys.partitions), min(AT_ONCE, self._keys.partitions))
            errors = await gather_bounded(map(self._try, partitions))
            self._error = errors[0] if all(errors) else None
            self._tried_at = monotonic()
        if self._error is not None:
            raise self._error

    async def _try(self, partition: int) -> PersistenceError | None:
        key = self._keys.probe(partition)
        try:
            await self._scripts.run("try_write", "", [key], {"channel": key, "life_ms": LIFE_MS})
        except PersistenceError as error:
            return error
        return None
