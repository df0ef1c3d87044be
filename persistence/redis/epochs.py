"""Epochs: how it is noticed that a partition's Redis may have forgotten its last writes.

A server has another replication id after each start and after each promotion to master. The first connection that meets
a new one begins a new epoch of each of its partitions, before anything else is asked of it; a session of an older epoch is
compared with Postgres at its next use. Nothing is asked of Postgres for that while the server stays the same.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from persistence.errors import RedisUnavailable
from persistence.redis.keys import Keys
from persistence.redis.pool import Argument
from persistence.tasks import gather_bounded

FENCE_JUMP = 1_000_000
"""Fences that a new epoch leaves out: more than a lost master can have given since its last write that is left."""

Call = tuple[Sequence[str], Mapping[str, Argument]]
"""The keys and the arguments of one run of a script."""

RunAll = Callable[[str, Sequence[Call]], Awaitable[list[list[Any] | None]]]
"""Runs a script several times in one round trip; a reply each, None where another server has the keys."""


class Fences:
    """The newest fence by partition that this process has been given: who has met a number above all that Redis and Postgres
    know after a loss can tell how many turns may be lost."""

    def __init__(self) -> None:
        self.newest: dict[int, int] = {}

    def note(self, partition: int, fence: int) -> None:
        """A turn has begun."""
        if fence > self.newest.get(partition, 0):
            self.newest[partition] = fence


class Mark(NamedTuple):
    """What Postgres knows of a partition: its newest epoch, and the newest fence of a turn."""

    epoch: int = 0
    fence: int = 0


class Epoch(NamedTuple):
    """A partition's epoch, for operators. Counted are the turns that may be `lost` with a master, as far as anybody knows;
    sessions that were taken as they are without a look into Postgres (`vouched`, in this epoch); turns stored behind others;
    sessions erased again."""

    partition: int
    epoch: int
    server: str
    settled_at: str
    lost: int
    vouched: int
    stored_behind: int
    erased_again: int


class Reads(Protocol):
    """The scripts, as far as epochs need them: they are settled by what is here, so they rank above it."""

    async def run(self, name: str, session_id: str, keys: Sequence[str], arguments: Mapping[str, Argument]) -> list[Any]: ...

    async def command(self, command: str, key: str, *arguments: Argument) -> Any: ...


class Epochs:
    """Begins epochs, by one script a partition."""

    def __init__(self, keys: Keys, fences: Fences) -> None:
        self._keys = keys
        self._fences = fences

    async def unsettled(self, run_all: RunAll, server: str) -> dict[int, int]:
        """The partitions of a server whose epoch began on another one, with that epoch (0: none yet)."""
        partitions = range(self._keys.partitions)
        replies = await run_all("settle", [self._call(partition, server) for partition in partitions])
        told = zip(partitions, replies, strict=True)
        return {partition: int(reply[1]) for partition, reply in told if reply is not None and reply[0] == "unsettled"}

    async def settle(self, run_all: RunAll, server: str, marks: Mapping[int, Mark], *, redo: bool = False) -> dict[int, int]:
        """Begins a new epoch of the partitions of `marks`, unless somebody else has by now; their epochs. With `redo` also
        where the server is the same, if the epoch is not above the mark's."""
        partitions = list(marks)
        calls = [self._call(partition, server, marks[partition], redo=redo) for partition in partitions]
        replies = await run_all("settle", calls)
        return {partition: int(reply[1]) for partition, reply in zip(partitions, replies, strict=True) if reply is not None}

    async def read(self, scripts: Reads, partition: int) -> Epoch:
        """What Redis knows of a partition's epoch."""
        names = ("epoch", "server", "settled_at", "lost", "vouched", "stored_behind", "erased_again")
        values = await scripts.command("HMGET", self._keys.epoch(partition), *names)
        epoch, server, settled_at, *counts = ((value or b"").decode(errors="replace") for value in values)
        numbers = (int(text) if text.isdigit() else 0 for text in (epoch, *counts))
        number, lost, vouched, stored_behind, erased_again = numbers
        return Epoch(partition, number, server, settled_at, lost, vouched, stored_behind, erased_again)

    async def read_all(self, scripts: Reads) -> list[Epoch]:
        """What Redis knows of the epochs of all partitions, without those whose server does not answer."""

        async def find(partition: int) -> Epoch | None:
            try:
                return await self.read(scripts, partition)
            except RedisUnavailable:
                return None

        found = await gather_bounded(find(partition) for partition in range(self._keys.partitions))
        return [one for one in found if one is not None]

    async def end(self, scripts: Reads, held: Epoch, after: int) -> int:
        """Ends the epoch of a partition whose server is the same, if it is not above `after`; the epoch that it has then."""
        keys, arguments = self._call(held.partition, held.server, Mark(after), redo=True)
        return int((await scripts.run("settle", "", keys, arguments))[1])

    def _call(self, partition: int, server: str, mark: Mark | None = None, *, redo: bool = False) -> Call:
        arguments: dict[str, Argument] = {
            "server": server,
            "after": "" if mark is None else mark.epoch,
            "redo": int(redo),
            "fence": 0 if mark is None else mark.fence,
            "seen": self._fences.newest.get(partition, 0),
            "jump": FENCE_JUMP,
        }
        return [self._keys.epoch(partition), self._keys.fence(partition)], arguments
