"""The probe of readiness: a small write, for a server that answers may yet take none."""

import asyncio
import random
from time import monotonic

from persistence.errors import PersistenceError
from persistence.redis.keys import Keys
from persistence.redis.scripts import Scripts

FRESH_S = 1.0
"""How long an outcome is good for, so that balancers may ask as often as they like."""
AT_ONCE = 12
"""Partitions that are tried where the last one fails. With a third of a cluster dead, all of them are on it once in half a
million times."""
TIMEOUT_S = 0.9
"""Shorter than that of a turn's calls: balancers do not wait for long."""
LIFE_MS = 10_000


class Probe:
    """Tries a write, once a second at most. A pod is of use as long as one partition takes writes."""

    def __init__(self, scripts: Scripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys
        self._good = 0
        self._tried_at = -FRESH_S
        self._error: PersistenceError | None = None
        self._trying = asyncio.Lock()

    async def check(self) -> None:
        """Raises RedisUnavailable or CommandRefused when no turn is possible."""
        async with self._trying:
            if monotonic() - self._tried_at >= FRESH_S:
                self._error = await self._find_error()
                self._tried_at = monotonic()
        if self._error is not None:
            raise self._error.with_traceback(None)

    async def _find_error(self) -> PersistenceError | None:
        """None as soon as one partition has taken a write: first the one that did so last, then others."""
        error = await self._try(self._good)
        if error is None:
            return None
        others = random.sample(range(self._keys.partitions), min(AT_ONCE, self._keys.partitions))
        tries = {asyncio.ensure_future(self._try(partition)): partition for partition in others if partition != self._good}
        try:
            pending = set(tries)
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                for one in done:
                    if one.result() is None:
                        self._good = tries[one]
                        return None
        finally:
            for one in tries:
                one.cancel()
        return error

    async def _try(self, partition: int) -> PersistenceError | None:
        key = self._keys.probe(partition)
        try:
            await self._scripts.run("try_write", "", [key], {"channel": key, "life_ms": LIFE_MS}, TIMEOUT_S)
        except PersistenceError as error:
            return error
        return None
