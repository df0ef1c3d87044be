"""One limit as a pod knows it: a bucket of turns in time, or the usage of an agent; and the headers that tell clients of it.

Nothing here knows of Redis or of other limits: `ledger.py` keeps them in step.
"""

import asyncio
from functools import lru_cache
from ipaddress import IPv6Address, IPv6Network, ip_address
from math import ceil, floor
from time import monotonic, time

from persistence.model.agents import RateLimit

RUNNING_LIFE_MS = 5_000
"""The running turns of a pod count until so long after its last sync: a dead pod runs none."""
DAY_S = 86_400


class Bucket:
    """One rate limit (generic cell rate algorithm, ITU-T I.371).

    Charged until `tat_s` (monotonic) and, without a gap, since `busy_since_s`. `pending` turns are not in Redis yet.
    """

    __slots__ = ("busy_since_s", "interval_s", "pending", "per_s", "tat_s")

    def __init__(self, limit: RateLimit) -> None:
        self.tat_s = 0.0
        self.busy_since_s = 0.0
        self.pending = 0
        self.set(limit)

    def set(self, limit: RateLimit) -> None:
        """Replaces the limit: an operator may change it at any time."""
        self.per_s: float = limit.per_s
        self.interval_s = limit.per_s / limit.messages

    def wait_s(self, now: float) -> float:
        """Seconds until the bucket has room for a turn; not positive when it has."""
        return max(self.tat_s, now) + self.interval_s - self.per_s - now

    def charge(self, now: float) -> None:
        if self.tat_s <= now:
            self.busy_since_s = self.tat_s = now
        self.tat_s += self.interval_s
        self.pending += 1

    def refund(self, charged_s: float) -> None:
        """Undoes the charge of `charged_s`, unless the bucket has run empty since: that undid it."""
        self.pending -= 1
        if charged_s >= self.busy_since_s:
            self.tat_s -= self.interval_s

    def restore_pending(self, turns: int, now: float) -> None:
        """Makes turns pending again after a failed sync; at most what the bucket still holds, so that an outage is not
        charged for when it is over."""
        held = ceil(max(self.tat_s - now, 0) / self.interval_s)
        self.pending = min(self.pending + turns, held)

    def sync(self, ahead_ms: int, now: float) -> None:
        """Takes over what all pods have charged beyond now, and adds what is pending here."""
        self.tat_s = now + max(ahead_ms / 1000 + self.pending * self.interval_s, 0)


class AgentUsage:
    """An agent's running turns and its turns of today (UTC), on this pod and on the others.

    `asking` turns hold a place too while they ask for their session: each runs in a moment, or gives the place back.
    """

    __slots__ = (
        "answered",
        "asking",
        "day",
        "day_ends_s",
        "first_sync",
        "others",
        "pending_day",
        "requested_s",
        "running",
        "synced_s",
        "syncing_day",
    )

    def __init__(self) -> None:
        self.running = 0
        self.asking = 0
        self.answered = asyncio.Event()
        self.others = 0
        self.synced_s = 0.0
        self.day = 0
        self.pending_day = 0
        # In a sync whose reply has not come: these turns count as well.
        self.syncing_day = 0
        self.day_ends_s = monotonic() + DAY_S - time() % DAY_S
        self.requested_s = monotonic()
        self.first_sync: asyncio.Task[None] | None = None

    def elsewhere(self, now: float) -> int:
        """Running turns of other pods; 0 once the last sync is too old to be true."""
        return self.others if now - self.synced_s < RUNNING_LIFE_MS / 1000 else 0

    @property
    def today(self) -> int:
        """Turns of today, the pending ones included."""
        return self.day + self.syncing_day + self.pending_day

    def is_today(self, day_ends_s: float) -> bool:
        """Whether a day that ends then is this one; the end that Redis gives differs by some milliseconds."""
        return abs(day_ends_s - self.day_ends_s) < DAY_S / 2

    def begin_day(self, now: float) -> None:
        """Begins a new day if it is past midnight (UTC)."""
        if now >= self.day_ends_s:
            self.day = self.pending_day = 0
            self.day_ends_s += DAY_S

    def began(self) -> None:
        """One of the asking turns runs."""
        self.running += 1
        self.asked()

    def asked(self) -> None:
        """One of the asking turns has its answer: those that wait for a place look again."""
        self.asking -= 1
        self.answered.set()
        self.answered = asyncio.Event()


@lru_cache(maxsize=4096)
def network(address: str) -> str:
    """The addresses of one client: an IPv4 address, or the /64 of an IPv6 address (RFC 6177: no site has less)."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(parsed, IPv6Address):
        return str(parsed.ipv4_mapped or IPv6Network((int(parsed) >> 64 << 64, 64)))
    return str(parsed)


def remaining_of(limit: RateLimit, ahead_s: float) -> int:
    """Turns that a limit has room for when it is charged for `ahead_s` seconds beyond now."""
    return max(floor((limit.per_s - ahead_s) * limit.messages / limit.per_s + 1e-6), 0)


def rate_headers(limits: list[tuple[str, RateLimit, int, float]]) -> dict[str, str]:
    """RateLimit and RateLimit-Policy (draft-ietf-httpapi-ratelimit-headers-11) of limits as (name, limit, left, seconds).

    `left` counts turns. The seconds are those until the whole limit is free again or, when nothing of it is left, those of
    Retry-After.
    """
    if not limits:
        return {}
    return {
        "RateLimit-Policy": ", ".join(f'"{name}";q={limit.messages};w={limit.per_s}' for name, limit, _, _ in limits),
        "RateLimit": ", ".join(f'"{name}";r={left};t={max(ceil(seconds), 0)}' for name, _, left, seconds in limits),
    }
