"""Rate limits that are not about one session."""

from persistence.keys import Keys
from persistence.scripts import Scripts


class Limits:
    """Shared buckets in Redis, one key each, gone when they are empty."""

    def __init__(self, scripts: Scripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys

    async def charge(self, bucket: str, cost: int, interval_ms: float) -> int:
        """Charges `cost` turns of `interval_ms` each; how many ms the bucket is now charged ahead of time."""
        arguments = {"cost": cost, "interval_ms": interval_ms}
        return int((await self._scripts.run("limit", bucket, [self._keys.limit(bucket)], arguments))[1])
