"""Faults of pods, workers and visitors."""

import asyncio
import signal
from time import monotonic

from tests.chaos.harm import Harm, stall_s
from tests.chaos.site import Site

AT_WORK_S = 20.0
"""How long a fault waits for a worker to be at work: one that was started a moment ago on a busy machine is not yet."""


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
    due_at, before = monotonic() + AT_WORK_S, await site.store.last_taken()
    while monotonic() < due_at:
        now = await site.store.last_taken()
        if now != before and now is not None and before is not None:
            return
        before = now
        await asyncio.sleep(0.02 if site.store.keys.partitions == 1 else 0.2)


async def worker_stalled(harm: Harm) -> None:
    """SIGSTOP of a worker until another one has claimed what it had, then SIGCONT."""
    worker = harm.chance.choice(harm.site.workers)
    worker.signal(signal.SIGSTOP)
    await asyncio.sleep(stall_s(harm.site.options))
    worker.signal(signal.SIGCONT)


async def clients_gone(harm: Harm) -> None:
    """Half of all requests are cut off by the visitor midway."""
    harm.visitors.cancel_share = 0.5
    await harm.wait(4, 6)
    harm.visitors.cancel_share = 0
