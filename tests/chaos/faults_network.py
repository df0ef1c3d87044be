"""Faults of the links between pods or workers and their stores."""

import asyncio

from tests.chaos.harm import Harm


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
