"""One limit, as a pod knows it: a bucket of messages in time, or the bounds of an agent; and how clients are told of it.

Nothing here knows of Redis or of other limits: `gateway/limits/limiter.py` does.
"""

import asyncio
from functools import lru_cache
from ipaddress import IPv6Address, IPv6Network, ip_address
from math import ceil, floor
from time import monotonic, time

from persistence.model.agents import RateLimit

RUNNING_LIFE_MS = 5_000
"""A pod that has said nothing for so long runs no turns."""
DAY_S = 86_400


class Bucket:
    """One limit of messages in time, as this pod knows it (generic cell rate algorithm, ITU-T I.371).

    Charged until `tat_s` (monotonic) and, without a gap, since `busy_since_s`; `untold` turns are not in Redis yet.
    """

    __slots__ = ("busy_since_s", "interval_s", "per_s", "tat_s", "untold")

    def __init__(self, limit: RateLimit) -> None:
        self.tat_s = 0.0
        self.busy_since_s = 0.0
        self.untold = 0
        self.set(limit)

    def set(self, limit: RateLimit) -> None:
        """Takes another limit on: an operator may change it at any time."""
        self.per_s: float = limit.per_s
        self.interval_s = limit.per_s / limit.messages

    def wait_s(self, now: float) -> float:
        """How long until there is room for a turn; not positive when there is."""
        return max(self.tat_s, now) + self.interval_s - self.per_s - now

    def charge(self, now: float) -> None:
        if self.tat_s <= now:
            self.busy_since_s = self.tat_s = now
        self.tat_s += self.interval_s
        self.untold += 1

    def give_back(self, charged_s: float) -> None:
        """Takes back what was charged at `charged_s`. What has run empty since has given it back by itself."""
        self.untold -= 1
        if charged_s >= self.busy_since_s:
            self.tat_s -= self.interval_s

    def keep_untold(self, turns: int, now: float) -> None:
        """Keeps what could not be told, as far as it is charged yet: an outage must not be charged for when it is over."""
        charged = ceil(max(self.tat_s - now, 0) / self.interval_s)
        self.untold = min(self.untold + turns, charged)

    def learn(self, ahead_ms: int, now: float) -> None:
        """Follows what all pods have, and what of this one is not among it yet."""
        self.tat_s = now + max(ahead_ms / 1000 + self.untold * self.interval_s, 0)


class Bounds:
    """An agent's turns that run now and those of today, on this pod and on the others.

    `asking` turns have a place as well, and ask for their sessions: each runs in a moment, or lets the place go.
    """

    __slots__ = (
        "answered",
        "asked_s",
        "asking",
        "day",
        "day_ends_s",
        "learned_s",
        "meeting",
        "others",
        "running",
        "telling_day",
        "untold_day",
    )

    def __init__(self) -> None:
        self.running = 0
        self.asking = 0
        self.answered = asyncio.Event()
        self.others = 0
        self.learned_s = 0.0
        self.day = 0
        self.untold_day = 0
        # Told, and not known to be heard yet: these have been let through as well.
        self.telling_day = 0
        self.day_ends_s = monotonic() + DAY_S - time() % DAY_S
        self.asked_s = monotonic()
        self.meeting: asyncio.Task[None] | None = None

    def elsewhere(self, now: float) -> int:
        """Turns that run on other pods, as long as that can be true."""
        return self.others if now - self.learned_s < RUNNING_LIFE_MS / 1000 else 0

    @property
    def today(self) -> int:
        """Turns of today, those included that no other pod knows of."""
        return self.day + self.telling_day + self.untold_day

    def is_today(self, day_ends_s: float) -> bool:
        """Whether a day that ends then is this one. What Redis says of its end comes some milliseconds sooner or later."""
        return abs(day_ends_s - self.day_ends_s) < DAY_S / 2

    def turn_day(self, now: float) -> None:
        """Begins a new day at midnight (UTC)."""
        if now >= self.day_ends_s:
            self.day = self.untold_day = 0
            self.day_ends_s += DAY_S


@lru_cache(maxsize=4096)
def network(address: str) -> str:
    """What one client has of addresses: an IPv4 address, or the /64 of an IPv6 address (RFC 6177: no site has less)."""
    try:
        parsed = ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(parsed, IPv6Address):
        return str(parsed.ipv4_mapped or IPv6Network((int(parsed) >> 64 << 64, 64)))
    return str(parsed)


def left_of(limit: RateLimit, ahead_s: float) -> int:
    """How many turns there is room for in a limit that is charged for so long."""
    return max(floor((limit.per_s - ahead_s) * limit.messages / limit.per_s + 1e-6), 0)


def rate_headers(found: list[tuple[str, RateLimit, int, float]]) -> dict[str, str]:
    """The fields of draft-ietf-httpapi-ratelimit-headers-11, for limits as (name, limit, turns left, seconds).

    The seconds are those until all of a limit is there again or, when nothing of it is left, what Retry-After says.
    """
    if not found:
        return {}
    return {
        "RateLimit-Policy": ", ".join(f'"{name}";q={limit.messages};w={limit.per_s}' for name, limit, _, _ in found),
        "RateLimit": ", ".join(f'"{name}";r={left};t={max(ceil(seconds), 0)}' for name, _, left, seconds in found),
    }
