"""One run: start, talk and harm, mend, drain, check."""

import asyncio
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from time import monotonic

from tests.chaos.faults import FAULTS, go_together, inject, lasts_s, usual
from tests.chaos.harm import Window
from tests.chaos.ledger import Ledger
from tests.chaos.options import Options
from tests.chaos.site import Site
from tests.chaos.store import AWAY
from tests.chaos.unavailability import Seen, limits_broken, seen, turned_away_in_peace
from tests.chaos.verdict import Verdict, check
from tests.chaos.visitors import Visitors
from tests.chaos.watch import watch_redis

QUIET_S = 2.0
"""How long visitors talk before the first fault: one that finds nobody there harms nobody."""


@dataclass
class Outcome:
    """What came of a run. `seconds` is how long the visitors talked, `drain_s` how long the outbox took afterwards."""

    options: Options
    ledger: Ledger
    windows: list[Window]
    seen: list[Seen]
    verdict: Verdict
    foreign_replies: int
    restarts: int
    seconds: float
    drain_s: float


async def run(options: Options, say: Callable[[str], None] = lambda text: None) -> Outcome:
    """Runs the chaos that the options ask for; `say` is told what happens."""
    folder = Path(tempfile.mkdtemp(prefix="chaos-"))
    # PostgreSQL may run as another user than this one.
    folder.chmod(0o755)
    async with Site(options, folder) as site:
        outcome = await _run(options, site, say)
    if outcome.verdict.breaches():
        say(f"the logs of all processes are in {folder}")
    else:
        shutil.rmtree(folder)
    return outcome


async def _run(options: Options, site: Site, say: Callable[[str], None]) -> Outcome:
    ledger = Ledger()
    windows: list[Window] = []
    visitors = Visitors(site, ledger)
    began_at = monotonic()
    visitors.start()
    watching = asyncio.create_task(watch_redis(site, ledger))
    schedule = _schedule(options, Random(f"schedule of seed {options.seed}"))
    await asyncio.sleep(QUIET_S)
    while not ledger.found(options.until):
        names = _next(options, schedule, len(windows), options.seconds - (monotonic() - began_at))
        if names is None:
            break
        say(f"{monotonic() - began_at:6.1f} s  {' and '.join(names)}")
        windows.append(await inject(names, site, visitors, ledger, f"fault {len(windows)} of seed {options.seed}"))
    while monotonic() - began_at < options.seconds and not ledger.found(options.until):
        await asyncio.sleep(0.1)
    say(f"{monotonic() - began_at:6.1f} s  visitors finish what they are at")
    await visitors.stop()
    seconds = monotonic() - began_at
    drained, drain_s = await _drain(site, options.drain_s)
    await visitors.look_again()
    await visitors.close()
    if watching.done():
        ledger.unexpected.append(f"nobody looked at Redis any more: {watching.exception()!r}")
    watching.cancel()
    await _stop(site, ledger, drained)
    say(f"{monotonic() - began_at:6.1f} s  {'drained' if drained else 'NOT drained'}; reading both stores")
    foreign_replies = site.logged("redis.foreign_reply")
    ledger.unexpected += site.deaths
    if not foreign_replies and any({"replies-planted", "replies-misplaced"} & set(window.names) for window in windows):
        ledger.unexpected.append("nobody noticed the foreign replies")
    verdict = await check(site, ledger, drained=drained)
    found = seen(windows, ledger)
    verdict.slow = limits_broken(found, options.lease_s) + turned_away_in_peace(windows, ledger)
    return Outcome(options, ledger, windows, found, verdict, foreign_replies, site.restarts, seconds, drain_s)


def _schedule(options: Options, chance: Random) -> Iterator[tuple[str, ...]]:
    """The faults in random order, each as often as the others; some of them two at once."""
    names = list(options.faults or usual(options))
    while True:
        order = chance.sample(names, len(names))
        for index, name in enumerate(order):
            partner = order[index - 1]
            together = chance.random() < options.together and go_together(name, partner)
            yield (name, partner) if together else (name,)


def _next(options: Options, schedule: Iterator[tuple[str, ...]], injected: int, left_s: float) -> tuple[str, ...] | None:
    """What is injected next; None when the run is over.

    A fault that would outlast the run is passed over. When that is so for all, the run is over.
    """
    if options.once:
        return next(schedule) if injected < len(options.faults) else None
    if left_s <= 3:
        return None
    return next((names for names in islice(schedule, 2 * len(FAULTS)) if lasts_s(names, options) < left_s), None)


async def _stop(site: Site, ledger: Ledger, drained: bool) -> None:
    """Ends all pods and workers: nobody writes any more while both stores are compared."""
    for processes in (site.pods, site.workers):
        if not drained:
            # They would try for long to store what they have not been able to.
            for process in processes:
                site.kill(process)
            continue
        for status in await asyncio.gather(*(site.stop(process) for process in processes)):
            # One that was started a moment ago may not listen to signals yet.
            if status not in (0, -signal.SIGTERM):
                ledger.unexpected.append(f"a process that was told to stop ended with {status}")


async def _drain(site: Site, limit_s: float) -> tuple[bool, float]:
    """Waits until all is in Postgres and no turn runs; whether that came to pass, and the seconds it took."""
    began_at = monotonic()
    while monotonic() - began_at < limit_s:
        try:
            if await site.store.waiting() == (0, 0) and not await site.store.running():
                return True, monotonic() - began_at
        except AWAY:
            # A connection from before the last fault is found out now.
            pass
        await asyncio.sleep(0.1)
    return False, limit_s
