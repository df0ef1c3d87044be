"""Measures on servers of its own, and leaves figures, plots and profiles in .bench.

`scripts/bench turns`: what a turn costs, beside the limit and beside what else could be used; --quick compares versions.
`scripts/bench growth`: the same as sessions, histories and open streams grow.
`scripts/bench flush`: how fast a worker is, beside bare inserts, and how far behind.
`scripts/bench sizing`: pods, workers, memory and disk for a load, computed from those three.
`scripts/bench profile`: where the time of a turn goes in a pod.
`scripts/bench streams`: how much later than the graph's own a visitor's first text is, and what open streams cost.
`scripts/bench drain`: turns are queued while Postgres is down; what happens when it is back.
`scripts/bench flood`: what visitors notice of others who send ten times what their limit allows.

Each is a module of its name in scripts/benchmarks; the README there says how to read what they print.
"""

import argparse
import asyncio
import logging
from pathlib import Path
from typing import Any

import structlog
import uvloop

from scripts.benchmarks.drain import measure_drain
from scripts.benchmarks.flood import measure_flood
from scripts.benchmarks.flush import measure_flush
from scripts.benchmarks.growth import measure_growth
from scripts.benchmarks.profile import measure_profile
from scripts.benchmarks.sizing import measure_sizing
from scripts.benchmarks.streams import measure_streams
from scripts.benchmarks.turns import measure_turns


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="scripts/bench", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_speed(commands)
    _add_others(commands)
    options = parser.parse_args()
    # What this process does by itself, filling stores above all, is not what is watched here.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.WARNING))
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(options.run(options))


def _add_speed(commands: Any) -> None:
    turns = commands.add_parser("turns", help="what a turn costs, beside what else could be used")
    turns.add_argument(
        "--quick", action="store_true", help="the limits and the gateway at history 50 alone, in three minutes"
    )
    turns.add_argument("--beside", type=Path, metavar="CHECKOUT", help="another checkout, whose gateway is measured too")
    turns.add_argument("--rows", default="", help="rows, comma-separated (all)")
    turns.add_argument("--histories", help="stored messages of each session (0,50,200; quick: 50)")
    turns.add_argument("--rounds", type=int, default=9, help="rounds (9)")
    turns.add_argument("--seconds", type=float, default=1.5, help="seconds that a row is measured each time (1.5)")
    turns.add_argument("--warm-up", type=float, default=2, help="seconds before that (2)")
    turns.add_argument("--sessions", type=int, default=2000, help="sessions (2,000)")
    turns.add_argument("--connections", type=int, default=32, help="connections (32)")
    turns.add_argument("--no-paced", action="store_true", help="leave out the load that arrives at a fixed rate")
    turns.add_argument("--verbose", action="store_true", help="print each measurement of each round")
    turns.set_defaults(run=measure_turns)
    growth = commands.add_parser("growth", help="what a turn costs as sessions, histories and open streams grow")
    growth.add_argument("--parts", default="sessions,history,streams", help="what grows (sessions,history,streams)")
    growth.add_argument(
        "--sessions", default="1000,10000,100000,1000000", help="sessions in Redis (1000,10000,100000,1000000)"
    )
    growth.add_argument("--histories", default="0,50,200,500,2000", help="stored messages of a session (0,50,200,500,2000)")
    growth.add_argument("--streams", default="0,100,1000", help="open streams (0,100,1000)")
    growth.add_argument("--rounds", type=int, default=9, help="rounds, all sizes in turn (9)")
    growth.add_argument("--seconds", type=float, default=1.5, help="seconds of each (1.5)")
    growth.add_argument("--warm-up", type=float, default=2, help="seconds before that (2)")
    growth.set_defaults(run=measure_growth)
    flush = commands.add_parser("flush", help="how fast a worker is, beside bare inserts")
    flush.add_argument("--turns", type=int, default=50_000, help="turns of each round (50,000)")
    flush.add_argument("--rounds", type=int, default=3, help="rounds (3)")
    flush.add_argument("--lag-seconds", type=float, default=10, help="seconds for which the lag is looked at (10)")
    flush.set_defaults(run=measure_flush)
    sizing = commands.add_parser(
        "sizing", help="pods, workers, memory and disk for a load, from the last turns, growth and flush"
    )
    sizing.add_argument("--write", action="store_true", help="write the tables into scripts/benchmarks/README.md")
    sizing.set_defaults(run=measure_sizing)
    profile = commands.add_parser("profile", help="where the time of a turn goes: a flame graph and lists")
    profile.add_argument(
        "--row", default="message", choices=("message", "stream", "limit", "first", "rows"), help="what is looked at"
    )
    profile.add_argument("--history", type=int, default=50, help="stored messages of each session (50)")
    profile.add_argument("--seconds", type=float, default=10, help="seconds of each of two recordings (10)")
    profile.add_argument("--native", action="store_true", help="functions in C too")
    profile.set_defaults(run=measure_profile)


def _add_others(commands: Any) -> None:
    streams = commands.add_parser("streams", help="first token, and the cost of open streams")
    streams.add_argument("--rounds", type=int, default=200, help="turns measured each way (200)")
    streams.add_argument("--open", type=int, default=500, help="idle streams held open (500)")
    streams.set_defaults(run=measure_streams)
    drain = commands.add_parser("drain", help="how fast what waited for Postgres arrives")
    drain.add_argument("--turns", type=int, default=100_000, help="turns that wait (100,000)")
    drain.set_defaults(run=measure_drain)
    flood = commands.add_parser("flood", help="what a flood from others costs normal visitors")
    flood.add_argument("--rounds", type=int, default=7, help="rounds, calm and flood in turn (7)")
    flood.add_argument("--seconds", type=float, default=10, help="seconds of each (10)")
    flood.add_argument("--visitors", type=int, default=50, help="normal visitors (50)")
    flood.add_argument("--per-s", type=float, default=60, help="messages a second of all visitors together (60)")
    flood.add_argument("--flooders", type=int, default=1, help="addresses that flood (1)")
    flood.add_argument("--times", type=float, default=10, help="how many times its limit each sends (10)")
    flood.add_argument("--delay-ms", type=float, default=0, help="time that the agent takes (0)")
    flood.set_defaults(run=measure_flood)


if __name__ == "__main__":
    main()
