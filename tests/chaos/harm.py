"""What a fault is given, and how a run remembers when it was on."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random
from time import monotonic

from persistence.redis.outbox import CLAIM_IDLE_MS
from tests.chaos.ledger import Ledger
from tests.chaos.losses import Loss, read_held, read_hot
from tests.chaos.options import Options
from tests.chaos.site import Site
from tests.chaos.visitors import Visitors


@dataclass
class Window:
    """The time of one fault, or of several at once. `victims` are the sessions it hits by its nature, `covers` tells of
    others whether it hits them; `mended_at` is when the part that was harmed was there again; `calm_at` when nobody can meet
    the fault any more, `ended_at` when all who have met it have been answered."""

    names: tuple[str, ...]
    began_at: float
    mended_at: float = 0.0
    calm_at: float = 0.0
    ended_at: float = 0.0
    victims: set[str] = field(default_factory=set)
    covers: Callable[[str], bool] = lambda session_id: False

    def hits(self, session_id: str) -> bool:
        """Whether the fault hit a session by its nature."""
        return session_id in self.victims or self.covers(session_id)


@dataclass
class Harm:
    """What a fault may lay its hands on."""

    site: Site
    visitors: Visitors
    ledger: Ledger
    chance: Random
    window: Window

    @property
    def lease_s(self) -> float:
        return self.site.options.lease_s

    def on_pod(self, index: int) -> set[str]:
        return self.ledger.on_pod(index, monotonic())

    async def wait(self, least_s: float, most_s: float) -> None:
        await asyncio.sleep(self.chance.uniform(least_s, most_s))

    def open_loss(self, since: float, covers: Callable[[str], bool] = lambda session_id: True) -> Loss:
        """From `since` on a Redis may forget what it answers about these sessions."""
        return self.ledger.losses.open(self.window.names[0], since, covers)

    async def close_loss(self, loss: Loss, *, goes_on: bool = False) -> None:
        """It can answer nobody any more. What Postgres has now must hold, and what a Redis has that goes on in its place."""
        until = monotonic()
        store = self.site.store
        # Redis first: what leaves it meanwhile is in Postgres.
        hot = await read_hot(store.client, store.keys) if goes_on else None
        held = await read_held(self.site.postgres.url)
        self.ledger.losses.close(loss, until, held | hot if hot is not None else held)


def outage_s(options: Options) -> float:
    """How long Postgres is down."""
    return min(120, options.seconds / 5)


def lock_s(options: Options) -> float:
    """How long a table is locked."""
    return min(60, options.seconds / 5)


def stall_s(options: Options) -> float:
    """How long a worker is stalled: twice the lease, and longer than it takes until others claim what it had."""
    return max(2 * options.lease_s, CLAIM_IDLE_MS / 1000 + 2)


def dead_s(options: Options) -> float:
    """How long a shard is dead."""
    return min(20, options.seconds / 3)
