"""`scripts/chaos`: exit status 0 when every promise was kept, 1 when one was broken."""

import argparse
import asyncio
import sys

import uvloop

from gateway.logs import configure_logs
from tests.chaos.faults import ALL, FAULTS, Fault
from tests.chaos.options import Options
from tests.chaos.report import report
from tests.chaos.run import run


def main() -> int:
    """Runs, prints, judges."""
    described = "\n".join(f"  {name:<20}{_where(fault)}{fault.inject.__doc__}" for name, fault in FAULTS.items())
    parser = argparse.ArgumentParser(
        prog="scripts/chaos",
        description="Kills, stalls, cuts and fills while visitors chat; then looks whether anything answered was lost.",
        epilog=f"faults:\n{described}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=60, help="how long visitors talk (60)")
    parser.add_argument("--seed", type=int, default=1, help="what the faults and the visitors are drawn from (1)")
    parser.add_argument("--topology", choices=ALL, default="single", help="of Redis (single)")
    parser.add_argument("--faults", default="", help="names, comma-separated (all)")
    parser.add_argument("--pods", type=int, default=2, help="gateway pods (2)")
    parser.add_argument("--workers", type=int, default=2, help="write-behind workers (2)")
    parser.add_argument("--visitors", type=int, default=24, help="visitors who talk at the same time (24)")
    parser.add_argument("--lease", type=float, default=5, help="GATEWAY_LEASE_S of the pods (5)")
    parser.add_argument("--appendfsync", choices=("always", "everysec"), default="always", help="of Redis (always)")
    parser.add_argument("--replicas", type=int, default=0, help="GATEWAY_REDIS_REPLICAS of pods and workers (0)")
    parser.add_argument("--min-replicas", action="store_true", help="min-replicas-to-write 1: no replica, no write")
    given = parser.parse_args()
    faults = tuple(name for name in given.faults.split(",") if name)
    for name in faults:
        if name not in FAULTS:
            parser.error(f"--faults: {name} is not one of {', '.join(FAULTS)}")
        if given.topology not in FAULTS[name].topologies:
            parser.error(f"--faults: {name} is a fault of {', '.join(FAULTS[name].topologies)} only")
        if missing := FAULTS[name].missing():
            parser.error(f"--faults: {name}: {missing}")
    if given.seconds <= 0 or given.pods < 1 or given.workers < 1 or given.visitors < 1 or not 1 <= given.lease <= 300:
        parser.error("--seconds, --pods, --workers and --visitors are above 0, --lease is 1 to 300")
    if given.topology == "single" and (given.replicas or given.min_replicas):
        parser.error("--replicas and --min-replicas are for topologies with replicas")
    options = Options(
        topology=given.topology,
        replicas=given.replicas,
        min_replicas=given.min_replicas,
        seconds=given.seconds,
        seed=given.seed,
        faults=faults,
        pods=given.pods,
        workers=given.workers,
        visitors=given.visitors,
        lease_s=given.lease,
        appendfsync=given.appendfsync,
    )
    for name, fault in FAULTS.items():
        if not faults and given.topology in fault.topologies and (missing := fault.missing()):
            print(f"left out: {name}, for {missing}", flush=True)
    configure_logs("text", "error")
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        outcome = runner.run(run(options, lambda text: print(text, flush=True)))
    print()
    print(report(outcome))
    return 1 if outcome.verdict.breaches() else 0


def _where(fault: Fault) -> str:
    """The topologies of a fault that has not all of them."""
    return "" if fault.topologies == ALL else f"[{', '.join(fault.topologies)}] "


if __name__ == "__main__":
    sys.exit(main())
