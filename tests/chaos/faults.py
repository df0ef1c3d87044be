"""The faults: each harms the site for a while and mends it again."""

import asyncio
import signal
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from time import monotonic
from typing import Any

from redis.asyncio import Redis

from persistence.redis.outbox import CLAIM_IDLE_MS
from tests.chaos.ledger import Conversation, Ledger
from tests.chaos.options import Options
from tests.chaos.site import AGENTS, Site
from tests.chaos.visitors import Visitors


@dataclass
class Window:
    """The time of one fault, or of several at once. `victims` are the sessions it hits by its nature; `mended_at` is when
    the part that was harmed was there again; `calm_at` when nobody can meet the fault any more, `ended_at` when all who have
    met it have been answered."""

    names: tuple[str, ...]
    began_at: float
    mended_at: float = 0.0
    calm_at: float = 0.0
    ended_at: float = 0.0
    victims: set[str] = field(default_factory=set)


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


AT_WORK_S = 20.0
"""How long a fault waits for a worker to be at work: one that was started a moment ago on a busy machine is not yet."""
LATE_S = 10.0
"""How long the next fault waits for those who are still not answered when all should be calm."""

Fault = Callable[[Harm], Awaitable[None]]


async def pod_killed(harm: Harm) -> None:
    """SIGKILL of a pod; it is started again."""
    index = harm.chance.randrange(len(harm.site.pods))
    pod = harm.site.pods[index]
    harm.window.victims |= harm.on_pod(index)
    harm.site.kill(pod)
    await harm.wait(0, 2)
    await harm.site.revive(pod)


async def pod_stalled(harm: Harm) -> None:
    """SIGSTOP of a pod for twice the lease, then SIGCONT: its turns must not be committed any more."""
    index = harm.chance.randrange(len(harm.site.pods))
    pod = harm.site.pods[index]
    harm.window.victims |= harm.on_pod(index)
    pod.signal(signal.SIGSTOP)
    # What is sent before the balancer has noticed hangs too.
    for _ in range(20):
        await asyncio.sleep(0.1)
        harm.window.victims |= harm.on_pod(index)
    await asyncio.sleep(2 * harm.lease_s - 2)
    pod.signal(signal.SIGCONT)


async def pod_restarted(harm: Harm) -> None:
    """SIGTERM of a pod: it drains and ends; it is started again."""
    pod = harm.chance.choice(harm.site.pods)
    status = await harm.site.stop(pod)
    if status != 0:
        harm.ledger.unexpected.append(f"a pod that was told to stop ended with {status}")
    await harm.site.revive(pod)


async def worker_killed(harm: Harm) -> None:
    """SIGKILL of a worker that is at work; it is started again under its name."""
    worker = harm.chance.choice(harm.site.workers)
    await _workers_take(harm.site)
    # What was taken is on its way to Postgres now, or there and not acknowledged.
    await asyncio.sleep(0.3)
    harm.site.kill(worker)
    await harm.wait(0, 2)
    await harm.site.revive(worker)


async def _workers_take(site: Site) -> None:
    """Waits until workers take records off the outbox, for AT_WORK_S at most."""
    due_at, before = monotonic() + AT_WORK_S, await site.last_taken()
    while monotonic() < due_at:
        now = await site.last_taken()
        if now != before and now is not None and before is not None:
            return
        before = now
        await asyncio.sleep(0.02)


async def worker_stalled(harm: Harm) -> None:
    """SIGSTOP of a worker until another one has claimed what it had, then SIGCONT."""
    worker = harm.chance.choice(harm.site.workers)
    worker.signal(signal.SIGSTOP)
    await asyncio.sleep(stall_s(harm.site.options))
    worker.signal(signal.SIGCONT)


async def redis_killed(harm: Harm) -> None:
    """SIGKILL of Redis; it is started again and reads its append-only file."""
    await asyncio.to_thread(harm.site.redis.kill)
    await harm.wait(0, 2)
    await asyncio.to_thread(harm.site.redis.start)


async def redis_restarted(harm: Harm) -> None:
    """Redis is told to stop, and started again."""
    await asyncio.to_thread(harm.site.redis.stop)
    await asyncio.to_thread(harm.site.redis.start)


async def postgres_killed(harm: Harm) -> None:
    """SIGKILL of PostgreSQL and of its sessions; it is started again."""
    await asyncio.to_thread(harm.site.postgres.kill)
    await harm.wait(0, 2)
    await asyncio.to_thread(harm.site.postgres.start)


async def postgres_down(harm: Harm) -> None:
    """PostgreSQL is away for a fifth of the run, two minutes at most."""
    await asyncio.to_thread(harm.site.postgres.stop)
    await asyncio.sleep(outage_s(harm.site.options))
    await asyncio.to_thread(harm.site.postgres.start)


async def connections_cut(harm: Harm) -> None:
    """One in ten requests to Redis or Postgres is carried out, and its connection cut before the reply."""
    await _trouble(harm, cut_share=0.1)


async def replies_delayed(harm: Harm) -> None:
    """Replies of Redis and Postgres are late, by up to one and a half times the time that a pod waits for one."""
    await _trouble(harm, delay_s=1.5)


async def replies_swallowed(harm: Harm) -> None:
    """One in twenty requests is carried out, and its connection stays open and says nothing more."""
    await _trouble(harm, swallow_share=0.05)


async def _trouble(harm: Harm, *, cut_share: float = 0, delay_s: float = 0, swallow_share: float = 0) -> None:
    links = harm.site.redis_links + harm.site.postgres_links
    for link in links:
        link.cut_share, link.delay_s, link.swallow_share = cut_share, delay_s, swallow_share
    await harm.wait(3, 5)
    for link in links:
        link.heal()


async def replies_planted(harm: Harm) -> None:
    """Replies about other sessions are put on connections: on idle ones, and before the reply that is waited for."""
    for _ in range(6):
        if heard := [link.overheard for link in harm.site.redis_links if link.overheard]:
            for link in harm.site.redis_links:
                link.stray, link.plant_share = harm.chance.choice(heard), 0.1
                link.plant_now(link.stray)
        await asyncio.sleep(0.5)
    for link in harm.site.redis_links:
        link.heal()


MISPLACED = 12
"""Replies, of all links together."""


async def replies_misplaced(harm: Harm) -> None:
    """In place of a reply comes that of the same script about another session, a dozen times."""
    links = harm.site.redis_links
    before = sum(link.misplaced for link in links)
    for _ in range(100):
        for link in links:
            link.misplace = 1
        await asyncio.sleep(0.1)
        if sum(link.misplaced for link in links) - before >= MISPLACED:
            break
    else:
        harm.ledger.unexpected.append("there were not enough replies to misplace")
    for link in links:
        link.heal()


async def clients_gone(harm: Harm) -> None:
    """Half of all requests are cut off by the visitor midway."""
    harm.visitors.cancel_share = 0.5
    await harm.wait(4, 6)
    harm.visitors.cancel_share = 0


async def scripts_flushed(harm: Harm) -> None:
    """SCRIPT FLUSH, several times."""
    for _ in range(10):
        await harm.site.client.script_flush()
        await asyncio.sleep(0.1)


async def redis_full_evicting(harm: Harm) -> None:
    """Redis is at its memory limit and may evict what Postgres has (volatile-lru)."""
    await _full(harm, harm.site.eviction)


async def redis_full_refusing(harm: Harm) -> None:
    """Redis is at its memory limit and may evict nothing (noeviction)."""
    await _full(harm, "noeviction")


async def _full(harm: Harm, policy: str) -> None:
    client = harm.site.client
    await client.config_set("maxmemory-policy", policy)
    memory = await client.info("memory")
    before = await _turned_out(client)
    await client.config_set("maxmemory", int(memory["used_memory"] * harm.site.options.memory_share))
    await harm.wait(3, 5)
    if await _turned_out(client) == before:
        harm.ledger.unexpected.append(f"Redis was not full: with {policy} it has evicted and refused nothing")
    await client.config_set("maxmemory", 0)
    await client.config_set("maxmemory-policy", harm.site.eviction)


async def _turned_out(client: Redis) -> int:
    """How many keys Redis has evicted and how many commands it has refused for want of memory."""
    stats: Any = await client.info("everything")
    return int(stats["evicted_keys"]) + int(stats.get("errorstat_OOM", {}).get("count", 0))


async def expiry_of_a_second(harm: Harm) -> None:
    """All sessions leave Redis a second after their last turn, if they may."""
    await harm.site.put_agent("usual", 1)
    await harm.wait(6, 9)
    await harm.site.put_agent("usual", AGENTS["usual"])


DAMAGE = """
local key = KEYS[1]
local held = redis.call('HMGET', key, 'turn', 'unflushed', 'turns')
if held[1] ~= '' or held[2] ~= '' or not held[3] then return false end
redis.call('HSET', key, 'turns', 'many')
return held[3]
"""


async def field_damaged(harm: Harm) -> None:
    """A field of a session in Redis is unreadable until it is noticed, then as it was: damage is not absence."""
    client, keys = harm.site.client, harm.site.keys
    for _ in range(200):
        open_ones = [one for one in harm.ledger.conversations if one.agent == "usual" and not one.over and one.answered()]
        if not open_ones:
            await asyncio.sleep(0.1)
            continue
        conversation = harm.chance.choice(open_ones)
        key = keys.session(conversation.session_id)
        was = await client.eval(DAMAGE, 1, key)
        if was is None:
            await asyncio.sleep(0.02)
            continue
        conversation.damaged = True
        harm.window.victims.add(conversation.session_id)
        noticed = await _is_asked_for(conversation)
        if await client.exists(key):
            await client.hset(key, "turns", was)
        # The last answers about it come in; whatever says so later is a breach.
        await asyncio.sleep(1)
        conversation.damaged = False
        if noticed:
            return


async def _is_asked_for(conversation: Conversation) -> bool:
    """Waits until a message of the session was answered or refused; whether one was, within three seconds."""
    began_at = monotonic()
    while monotonic() - began_at < 3:
        if conversation.heard_since(began_at):
            return True
        await asyncio.sleep(0.05)
    return False


FAULTS: dict[str, Fault] = {
    "pod-killed": pod_killed,
    "pod-stalled": pod_stalled,
    "pod-restarted": pod_restarted,
    "worker-killed": worker_killed,
    "worker-stalled": worker_stalled,
    "redis-killed": redis_killed,
    "redis-restarted": redis_restarted,
    "postgres-killed": postgres_killed,
    "postgres-down": postgres_down,
    "connections-cut": connections_cut,
    "replies-delayed": replies_delayed,
    "replies-swallowed": replies_swallowed,
    "replies-planted": replies_planted,
    "replies-misplaced": replies_misplaced,
    "clients-gone": clients_gone,
    "scripts-flushed": scripts_flushed,
    "redis-full-evicting": redis_full_evicting,
    "redis-full-refusing": redis_full_refusing,
    "expiry-of-a-second": expiry_of_a_second,
    "field-damaged": field_damaged,
}

AIMED = frozenset(("replies-misplaced",))
"""Faults that are injected only when they are named: they hit on purpose what others hit by chance."""
APART = frozenset(("field-damaged",))
"""Faults that never come together with another: what is damaged has to be mended in time."""
_STORES = {
    "redis-killed": "redis",
    "redis-restarted": "redis",
    "redis-full-evicting": "redis",
    "redis-full-refusing": "redis",
    "scripts-flushed": "redis",
    "expiry-of-a-second": "redis",
    "postgres-killed": "postgres",
    "postgres-down": "postgres",
    "pod-killed": "pod",
    "pod-stalled": "pod",
    "pod-restarted": "pod",
    "worker-killed": "worker",
    "worker-stalled": "worker",
    "connections-cut": "links",
    "replies-delayed": "links",
    "replies-swallowed": "links",
    "replies-planted": "links",
    "replies-misplaced": "links",
}


def outage_s(options: Options) -> float:
    """How long Postgres is down."""
    return min(120, options.seconds / 5)


def stall_s(options: Options) -> float:
    """How long a worker is stalled: twice the lease, and longer than it takes until others claim what it had."""
    return max(2 * options.lease_s, CLAIM_IDLE_MS / 1000 + 2)


def lasts_s(names: Sequence[str], options: Options) -> float:
    """The time that faults need at least, in seconds."""
    long = {
        "postgres-down": outage_s(options),
        "worker-stalled": stall_s(options),
        "pod-stalled": 2 * options.lease_s,
        "pod-killed": options.lease_s + 2,
    }
    return max(long.get(name, 2) for name in names)


def go_together(one: str, other: str) -> bool:
    """Whether two faults may be injected at once: not when both lay hands on the same part."""
    return not {one, other} & APART and one != other and (one not in _STORES or _STORES[one] != _STORES.get(other))


async def inject(names: tuple[str, ...], site: Site, visitors: Visitors, ledger: Ledger, seed: str) -> Window:
    """Injects faults at once, waits until all is calm, and tells when that was.

    Each draws from a source of its own: how often one has to look for its moment changes nothing of the others.
    """
    window = Window(names, monotonic())
    harms = {name: Harm(site, visitors, ledger, Random(f"{name} of {seed}"), window) for name in names}
    await asyncio.gather(*(FAULTS[name](harm) for name, harm in harms.items()))
    window.mended_at = monotonic()
    await site.healthy()
    # Whoever was refused asks again and is answered before the next fault comes, which may hit the same session.
    window.calm_at = max(monotonic(), window.mended_at + 2)
    if "pod-killed" in names:
        window.calm_at = max(window.calm_at, window.began_at + site.options.lease_s + 2)
    await asyncio.sleep(window.calm_at - monotonic())
    while ledger.is_awaited(window.calm_at) and monotonic() < window.calm_at + LATE_S:
        await asyncio.sleep(0.1)
    window.ended_at = monotonic()
    return window
