"""What a pod knows of all limits, kept in step with the other pods through Redis.

Five times a second the ledger sends Redis what was charged here and takes over what all pods have charged: one call for all
limits. In between a limit can be overrun by what the pods let through. While Redis is away each pod goes on with what it
knows.
"""

import asyncio
from collections import OrderedDict
from collections.abc import Mapping
from secrets import token_hex
from time import monotonic
from typing import NamedTuple

import structlog

from gateway.limits.buckets import RUNNING_LIFE_MS, AgentUsage, Bucket
from persistence.errors import PersistenceError
from persistence.model.agents import Agent, RateLimit
from persistence.redis.shared_limits import DayUpdate, LimitUpdate, RateUpdate, RunningUpdate, SharedLimits, SharedValue
from persistence.tasks import retrieve

log = structlog.get_logger()

MAX_BUCKETS = 50_000
"""Buckets that a pod keeps, some 300 bytes each."""
EXPIRED_AT_ONCE = 2_000
"""Buckets that one sync looks at for expiry: a flood of addresses must not make a sync long."""
SECOND_CHANCES = 8
USAGE_KEPT_S = 60.0
"""An agent's usage is synced until so long after the last request for the agent."""


class Charge(NamedTuple):
    """A turn that was charged to a bucket, to be refunded if it comes to nothing."""

    key: str
    bucket: Bucket
    charged_s: float


class Ledger:
    """The buckets and the agents' usage of one pod. `failing_since_s` is when syncs began to fail (monotonic)."""

    def __init__(self, shared: SharedLimits, *, max_buckets: int = MAX_BUCKETS) -> None:
        self.failing_since_s: float | None = None
        self._shared = shared
        self.max_buckets = max_buckets
        self._pod = token_hex(8)
        # LRU order: the most recently charged last; eviction takes from the front.
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._pending: set[str] = set()
        self._to_expire: list[str] = []
        self._usages: dict[str, AgentUsage] = {}

    # --------------------------------------------------------------------------------------------------------- buckets

    @property
    def keys(self) -> list[str]:
        """The keys of all buckets, the least recently charged first."""
        return list(self._buckets)

    @property
    def pending(self) -> int:
        """Buckets with turns that are not in Redis yet."""
        return len(self._pending)

    def find(self, key: str) -> Bucket | None:
        """The bucket of that key, if the pod has it."""
        return self._buckets.get(key)

    def bucket(self, key: str, limit: RateLimit) -> Bucket:
        """The bucket of that key, made if need be."""
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= self.max_buckets:
                self._evict()
            bucket = self._buckets[key] = Bucket(limit)
        else:
            bucket.set(limit)
        return bucket

    def _evict(self) -> None:
        """Evicts a bucket that was not charged for long; if it is made again, its sync takes over what Redis has of it.

        Buckets that are more than half full get a second chance.
        """
        now = monotonic()
        for _ in range(SECOND_CHANCES):
            key = next(iter(self._buckets))
            bucket = self._buckets[key]
            if bucket.tat_s - now < bucket.per_s / 2:
                break
            self._buckets.move_to_end(key)
        key, _ = self._buckets.popitem(last=False)
        self._pending.discard(key)

    def charge(self, key: str, bucket: Bucket, now: float) -> Charge:
        """Charges a turn to a bucket."""
        bucket.charge(now)
        if key in self._buckets:
            self._buckets.move_to_end(key)
            self._pending.add(key)
        return Charge(key, bucket, now)

    def refund(self, charge: Charge) -> None:
        """Undoes a charge."""
        charge.bucket.refund(charge.charged_s)
        if self._buckets.get(charge.key) is charge.bucket:
            self._pending.add(charge.key)

    def ahead_s(self, key: str) -> float:
        """For how many seconds beyond now a bucket is charged."""
        bucket = self._buckets.get(key)
        return max(bucket.tat_s - monotonic(), 0.0) if bucket is not None else 0.0

    def _expire(self) -> None:
        """Drops buckets that have run empty: some at each sync, all of them in turn."""
        now = monotonic()
        if not self._to_expire:
            self._to_expire = list(self._buckets)
        for key in self._to_expire[-EXPIRED_AT_ONCE:]:
            bucket = self._buckets.get(key)
            if bucket is not None and bucket.tat_s <= now and key not in self._pending:
                del self._buckets[key]
        del self._to_expire[-EXPIRED_AT_ONCE:]

    # ---------------------------------------------------------------------------------------------------- agents' usage

    def usage(self, agent: Agent) -> AgentUsage | None:
        """The agent's usage, if it is limited and was requested lately."""
        return self._usages.get(agent.id)

    async def request_usage(self, agent: Agent) -> None:
        """Keeps an agent's usage in step from now on; waits for the first sync, so that no decision is made without it."""
        usage = self._usages.get(agent.id)
        if usage is None:
            usage = self._usages[agent.id] = AgentUsage()
            usage.first_sync = asyncio.create_task(self._sync({}, {agent.id: usage}))
            usage.first_sync.add_done_callback(retrieve)
        usage.requested_s = monotonic()
        if usage.first_sync is not None:
            await asyncio.wait({usage.first_sync})
            usage.first_sync = None

    def _drop_usages(self) -> None:
        now = monotonic()
        for agent_id, usage in list(self._usages.items()):
            if now - usage.requested_s > USAGE_KEPT_S and not (usage.running or usage.asking or usage.pending_day):
                del self._usages[agent_id]

    # ------------------------------------------------------------------------------------------------------------ sync

    async def sync(self) -> None:
        """One sync with Redis: what is pending goes out, what all pods have comes in. Never raises PersistenceError."""
        pending, self._pending = self._pending, set()
        self._drop_usages()
        await self._sync({key: self._buckets[key] for key in pending if key in self._buckets}, dict(self._usages))
        self._expire()

    async def _sync(self, buckets: Mapping[str, Bucket], usages: Mapping[str, AgentUsage]) -> None:
        turns, days = _take_pending(buckets, usages)
        sent: dict[str, LimitUpdate] = {
            # Twice its window: pods that charge between two syncs may go a little beyond it.
            key: RateUpdate(turns[key], bucket.interval_s * 1000, 2 * bucket.per_s * 1000)
            for key, bucket in buckets.items()
        }
        for agent_id, usage in usages.items():
            sent[f"running:{agent_id}"] = RunningUpdate(self._pod, usage.running, RUNNING_LIFE_MS)
            sent[f"day:{agent_id}"] = DayUpdate(days[agent_id])
        if not sent:
            return
        received: dict[str, SharedValue] = {}
        try:
            received, error = await self._shared.sync(sent)
            self._note(error, monotonic())
        finally:
            # Whatever ended it, what was not sent is part of the next sync.
            self._take_over(received, buckets, turns, usages, days)

    def _take_over(
        self,
        received: Mapping[str, SharedValue],
        buckets: Mapping[str, Bucket],
        turns: Mapping[str, int],
        usages: Mapping[str, AgentUsage],
        days: Mapping[str, int],
    ) -> None:
        """Takes over what all pods have charged; makes pending again what was taken out and has no new value."""
        now = monotonic()
        for key, bucket in buckets.items():
            if key in received:
                bucket.sync(received[key].value, now)
            else:
                bucket.restore_pending(turns[key], now)
                if self._buckets.get(key) is bucket:
                    self._pending.add(key)
        for agent_id, usage in usages.items():
            _sync_usage(usage, days[agent_id], received.get(f"running:{agent_id}"), received.get(f"day:{agent_id}"), now)

    def _note(self, error: PersistenceError | None, now: float) -> None:
        if error is None:
            self.failing_since_s = None
            return
        if self.failing_since_s is None:
            self.failing_since_s = now
        log.warning("limits.sync_failed", error=str(error))


def _take_pending(buckets: Mapping[str, Bucket], usages: Mapping[str, AgentUsage]) -> tuple[dict[str, int], dict[str, int]]:
    """Takes the pending turns out: those of the buckets by key, and those of the agents' days by agent."""
    turns, days = {}, {}
    for key, bucket in buckets.items():
        turns[key], bucket.pending = bucket.pending, 0
    for agent_id, usage in usages.items():
        usage.begin_day(monotonic())
        days[agent_id], usage.pending_day = usage.pending_day, 0
        usage.syncing_day += days[agent_id]
    return turns, days


def _sync_usage(usage: AgentUsage, sent_day: int, running: SharedValue | None, day: SharedValue | None, now: float) -> None:
    """Takes over what came of an agent; turns of the day that were not sent are pending again."""
    if running is not None:
        usage.others, usage.synced_s = running.value, now
    usage.syncing_day -= sent_day
    if day is not None:
        usage.day, usage.day_ends_s = day.value, now + day.left_ms / 1000
    else:
        usage.pending_day += sent_day
