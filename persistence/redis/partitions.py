"""Work over all partitions that goes on while some of them cannot be reached: on a cluster one shard may be dead."""

from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Generic, NamedTuple, TypeVar

from persistence.errors import RedisUnavailable
from persistence.tasks import gather_bounded

LEFT_OUT_S = 2.0
"""How long a partition is left out after it could not be reached: each try may take as long as a call."""

Result = TypeVar("Result")


class Gathered(NamedTuple, Generic[Result]):
    """What the partitions that could be reached gave, and how many could not."""

    results: list[Result]
    unreachable: int


class Partitions:
    """The partitions as one user of them knows them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._left_out_until: dict[int, float] = {}

    async def gather(self, work: Callable[[int], Awaitable[Result]]) -> Gathered[Result]:
        """Does work on each partition, side by side. Raises RedisUnavailable when none of them can be reached."""
        errors: list[RedisUnavailable] = []

        async def one(partition: int) -> tuple[Result] | None:
            if self._count > 1 and monotonic() < self._left_out_until.get(partition, 0):
                return None
            try:
                done = (await work(partition),)
            except RedisUnavailable as error:
                self._left_out_until[partition] = monotonic() + LEFT_OUT_S
                errors.append(error)
                return None
            self._left_out_until.pop(partition, None)
            return done

        outcomes = await gather_bounded(map(one, range(self._count)))
        results = [outcome[0] for outcome in outcomes if outcome is not None]
        if not results and errors:
            raise errors[0]
        return Gathered(results, self._count - len(results))
