"""Work on all partitions of which some may be away: on Redis Cluster one shard can die or hang while the others serve.

A server that did not answer is left out for LEFT_OUT_S, so that its partitions do not cost 1.8 s each, round after round;
then one call asks whether it is back. What always holds: an error of one partition keeps no other from being worked on, and
only when none can be reached is it raised.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from time import monotonic
from typing import Generic, NamedTuple, TypeVar

from persistence.errors import ForeignReply, NotReplicated, RedisUnavailable
from persistence.redis.keys import Keys
from persistence.redis.scripts import Scripts
from persistence.tasks import gather_bounded

LEFT_OUT_S = 3.0
PROBE_S = 0.8
"""How long a server may take to answer that it is back."""

Result = TypeVar("Result")


class Reached(NamedTuple, Generic[Result]):
    """What came of each partition that could be reached, in order, and the partitions that could not."""

    results: list[Result]
    unreachable: list[int]


class _Missed(NamedTuple):
    """In place of a result: why a partition could not be reached."""

    error: RedisUnavailable


class _Away:
    """A server that did not answer: the error, until when it is left out, and who asks whether it is back."""

    def __init__(self) -> None:
        self.error = RedisUnavailable()
        self.until_s = 0.0
        self.asking = asyncio.Lock()


class Partitions:
    """The partitions of one Redis, and which of its servers are away. Shared by all that goes through them."""

    def __init__(self, scripts: Scripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys
        self._away: dict[str, _Away] = {}

    async def each(self, work: Callable[[int], Awaitable[Result]], at_once: int = 32) -> Reached[Result]:
        """Works on every partition, at most `at_once` side by side.

        Raises RedisUnavailable when none can be reached, and any other error of the work once all have ended.
        """
        partitions = range(self._keys.partitions)
        servers = {self._server_of(partition) for partition in partitions}
        if servers <= self._away.keys():
            # There is nobody whom asking would hold up.
            for server in servers:
                self._away[server].until_s = 0.0
        reached, error = await self._work_on(partitions, work, at_once)
        if error is not None and not reached.results:
            raise error
        return reached

    async def some(
        self, which: Iterable[int], work: Callable[[int], Awaitable[Result]], at_once: int = 32
    ) -> Reached[Result]:
        """Works on some partitions, as `each` does, also when none of them can be reached."""
        return (await self._work_on(list(which), work, at_once))[0]

    async def _work_on(
        self, partitions: Sequence[int], work: Callable[[int], Awaitable[Result]], at_once: int
    ) -> tuple[Reached[Result], RedisUnavailable | None]:
        outcomes = await gather_bounded((self._attempt(partition, work) for partition in partitions), at_once)
        results: list[Result] = []
        failures: dict[int, RedisUnavailable] = {}
        for partition, outcome in zip(partitions, outcomes, strict=True):
            if isinstance(outcome, _Missed):
                failures[partition] = outcome.error
            else:
                results.append(outcome)
        return Reached(results, list(failures)), next(iter(failures.values()), None)

    def _server_of(self, partition: int) -> str:
        return self._scripts.server_of(self._keys.epoch(partition))

    async def _attempt(self, partition: int, work: Callable[[int], Awaitable[Result]]) -> Result | _Missed:
        server = self._server_of(partition)
        if (error := await self._is_away(server, partition)) is not None:
            return _Missed(error)
        try:
            return await work(partition)
        except ForeignReply:
            raise
        except RedisUnavailable as failure:
            if not isinstance(failure, NotReplicated):
                self._leave_out(server, failure)
            return _Missed(failure)

    async def _is_away(self, server: str, partition: int) -> RedisUnavailable | None:
        """The error of a server that is left out; None of one that serves, or serves again."""
        while (away := self._away.get(server)) is not None:
            if monotonic() < away.until_s:
                return away.error
            if away.asking.locked():
                # Whatever the one who asks finds holds for all partitions of the server.
                async with away.asking:
                    continue
            async with away.asking:
                try:
                    await self._scripts.command("EXISTS", self._keys.epoch(partition), timeout_s=PROBE_S)
                except RedisUnavailable as error:
                    self._leave_out(server, error)
                else:
                    self._away.pop(server, None)
        return None

    def _leave_out(self, server: str, error: RedisUnavailable) -> None:
        away = self._away.setdefault(server, _Away())
        away.error, away.until_s = error, monotonic() + LEFT_OUT_S
