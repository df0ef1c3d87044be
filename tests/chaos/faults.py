"""All faults: each harms the site for a while and mends it again."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from random import Random
from time import monotonic

from tests.chaos import (
    faults_cluster,
    faults_failover,
    faults_network,
    faults_postgres,
    faults_processes,
    faults_redis,
    faults_rollback,
)
from tests.chaos.harm import Harm, Window, dead_s, lock_s, outage_s, stall_s
from tests.chaos.ledger import Ledger
from tests.chaos.options import Options, Topology
from tests.chaos.server import find_faketime
from tests.chaos.site import Site
from tests.chaos.visitors import Visitors

LATE_S = 10.0
"""How long the next fault waits for those who are still not answered when all should be calm."""

ALL: tuple[Topology, ...] = ("single", "sentinel", "cluster")
SINGLE: tuple[Topology, ...] = ("single",)
REPLICATED: tuple[Topology, ...] = ("sentinel", "cluster")


def _short(options: Options) -> float:
    return 2


@dataclass(frozen=True)
class Fault:
    """A row of the table. `part` is what the fault lays hands on: two with the same do not come together; `least_s` is the
    time that it needs at least.

    `aimed` ones are injected only when they are named: they hit on purpose what others hit by chance. `apart` ones never
    come together with another: what is damaged has to be mended in time, and what may be lost told from what may not.
    `missing` says what has to be installed, when it is not. Where Redis `comes_back` at the end of the fault, waits count
    from then on; `harmless` ones no session in Redis may notice."""

    inject: Callable[[Harm], Awaitable[None]]
    topologies: tuple[Topology, ...] = ALL
    part: str = ""
    least_s: Callable[[Options], float] = _short
    aimed: bool = False
    apart: bool = False
    comes_back: bool = False
    harmless: bool = False
    missing: Callable[[], str] = lambda: ""


FAULTS: dict[str, Fault] = {
    "pod-killed": Fault(faults_processes.pod_killed, part="pod", least_s=lambda options: options.lease_s + 2),
    "pod-stalled": Fault(faults_processes.pod_stalled, part="pod", least_s=lambda options: 2 * options.lease_s),
    "pod-restarted": Fault(faults_processes.pod_restarted, part="pod"),
    "worker-killed": Fault(faults_processes.worker_killed, part="worker", harmless=True),
    "worker-stalled": Fault(faults_processes.worker_stalled, part="worker", least_s=stall_s, harmless=True),
    "redis-killed": Fault(faults_redis.redis_killed, SINGLE, part="redis", comes_back=True),
    "redis-restarted": Fault(faults_redis.redis_restarted, SINGLE, part="redis", comes_back=True),
    "postgres-killed": Fault(faults_postgres.postgres_killed, part="postgres", harmless=True),
    "postgres-down": Fault(faults_postgres.postgres_down, part="postgres", least_s=outage_s, harmless=True),
    "postgres-read-only": Fault(
        faults_postgres.postgres_read_only, part="postgres", least_s=lambda options: 8, harmless=True
    ),
    "sessions-locked": Fault(faults_postgres.sessions_locked, part="postgres", least_s=lock_s, harmless=True),
    "connections-cut": Fault(faults_network.connections_cut, part="links"),
    "replies-delayed": Fault(faults_network.replies_delayed, part="links"),
    "replies-swallowed": Fault(faults_network.replies_swallowed, part="links"),
    "replies-planted": Fault(faults_network.replies_planted, SINGLE, part="links"),
    "replies-misplaced": Fault(faults_network.replies_misplaced, SINGLE, part="links", aimed=True),
    "clients-gone": Fault(faults_processes.clients_gone),
    "scripts-flushed": Fault(faults_redis.scripts_flushed, part="redis"),
    "redis-full-evicting": Fault(faults_redis.redis_full_evicting, part="redis"),
    "redis-full-refusing": Fault(faults_redis.redis_full_refusing, part="redis"),
    "redis-disk-full": Fault(faults_redis.redis_disk_full, SINGLE, part="redis", apart=True, least_s=lambda options: 7),
    "expiry-of-a-second": Fault(faults_redis.expiry_of_a_second, part="redis"),
    "field-damaged": Fault(faults_redis.field_damaged, apart=True),
    "clock-set-back": Fault(
        faults_redis.clock_set_back,
        SINGLE,
        part="redis",
        apart=True,
        least_s=lambda options: 8,
        missing=lambda: "" if find_faketime() else "libfaketime (Debian: the package faketime) is not installed",
    ),
    "rollback": Fault(
        faults_rollback.rollback, SINGLE, part="redis", apart=True, comes_back=True, least_s=lambda options: 10
    ),
    "power-cut": Fault(
        faults_rollback.power_cut, SINGLE, part="redis", apart=True, comes_back=True, least_s=lambda options: 6
    ),
    "master-killed": Fault(faults_failover.master_killed, REPLICATED, part="redis", apart=True, least_s=lambda options: 15),
    "replicas-cut-off": Fault(
        faults_failover.replicas_cut_off, REPLICATED, part="redis", apart=True, least_s=lambda options: 17
    ),
    "failover-planned": Fault(
        faults_failover.failover_planned, REPLICATED, part="redis", apart=True, least_s=lambda options: 12
    ),
    "partition": Fault(faults_failover.partition, ("sentinel",), part="redis", apart=True, least_s=lambda options: 20),
    "all-nodes-down": Fault(
        faults_failover.all_nodes_down,
        REPLICATED,
        part="redis",
        apart=True,
        comes_back=True,
        least_s=lambda options: 12,
    ),
    "resharded": Fault(faults_cluster.resharded, ("cluster",), part="redis", apart=True, least_s=lambda options: 10),
    "shard-dead": Fault(
        faults_cluster.shard_dead, ("cluster",), part="redis", apart=True, least_s=lambda options: dead_s(options) + 3
    ),
}


def usual(options: Options) -> list[str]:
    """What is injected where no fault is named."""
    return [
        name
        for name, fault in FAULTS.items()
        if options.topology in fault.topologies and not fault.aimed and not fault.missing()
    ]


def lasts_s(names: Sequence[str], options: Options) -> float:
    """The time that faults need at least, in seconds."""
    return max(FAULTS[name].least_s(options) for name in names)


def go_together(one: str, other: str) -> bool:
    """Whether two faults may be injected at once: not when both lay hands on the same part."""
    first, second = FAULTS[one], FAULTS[other]
    return one != other and not first.apart and not second.apart and (not first.part or first.part != second.part)


async def inject(names: tuple[str, ...], site: Site, visitors: Visitors, ledger: Ledger, seed: str) -> Window:
    """Injects faults at once, waits until all is calm, and tells when that was.

    Each draws from a source of its own: how often one has to look for its moment changes nothing of the others.
    """
    window = Window(names, monotonic())
    harms = {name: Harm(site, visitors, ledger, Random(f"{name} of {seed}"), window) for name in names}
    await asyncio.gather(*(FAULTS[name].inject(harm) for name, harm in harms.items()))
    window.mended_at = monotonic()
    try:
        await site.store.become_whole()
        await site.healthy()
    except AssertionError as error:
        ledger.unexpected.append(f"after {' and '.join(names)}: {error}")
    # Whoever was refused asks again and is answered before the next fault comes, which may hit the same session.
    window.calm_at = max(monotonic(), window.mended_at + 2)
    if "pod-killed" in names:
        window.calm_at = max(window.calm_at, window.began_at + site.options.lease_s + 2)
    await asyncio.sleep(window.calm_at - monotonic())
    while ledger.is_awaited(window.calm_at) and monotonic() < window.calm_at + LATE_S:
        await asyncio.sleep(0.1)
    window.ended_at = monotonic()
    return window
