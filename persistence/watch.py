"""The watch of the Redis servers: once a second each is asked who it is, and the Sentinels who is master."""

from persistence.errors import PostgresUnavailable
from persistence.redis.scripts import Scripts
from persistence.settler import Settler

EVERY_S = 1.0


class Watch:
    """One process' watch. That of a worker also ends the epochs that Postgres knows to be over."""

    def __init__(self, scripts: Scripts, settler: Settler, *, of_worker: bool) -> None:
        self._scripts = scripts
        self._settler = settler
        self._of_worker = of_worker

    async def look(self) -> None:
        """One look. Raises RedisUnavailable."""
        await self._scripts.check_servers()
        if self._of_worker:
            try:
                await self._settler.look(self._scripts)
            except PostgresUnavailable:
                # Nothing can be over that nobody can flush.
                return
