"""How much of everything a load needs, computed from what was measured: `scripts/bench sizing`.

Reads .bench/turns.json, flush.json and growth.json. With --write it writes its tables into README.md beside this, between
their marks.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from math import ceil
from pathlib import Path
from typing import Any, NamedTuple

from scripts.benchmarks.results import saved
from scripts.benchmarks.turns import ROWS

README = Path(__file__).with_name("README.md")
RATES = (10, 1000, 10_000)
HISTORY = 50
USED = 0.6
"""How much of a core is planned for: what is above is for peaks, for a pod that is replaced, and for short waits."""
TURNS_A_VISIT = 10
SECONDS_A_TURN = 30
HOT_S = 1800
DAY_S = 86_400


class Measured(NamedTuple):
    """What the table is computed from. Milliseconds are processor time per turn."""

    pod_per_s: float
    worker_per_s: float
    redis_ms: float
    postgres_ms: float
    empty_bytes: float
    message_bytes: float
    stored_bytes: float


class Size(NamedTuple):
    """What a rate of turns needs."""

    rate: int
    pods: int
    workers: int
    redis_cores: float
    redis_bytes: float
    postgres_cores: float
    day_bytes: float


async def measure_sizing(options: argparse.Namespace) -> None:
    """Prints the tables as Markdown."""
    turns, flush, growth = (saved(name) for name in ("turns", "flush", "growth"))
    missing = [name for name, found in (("turns", turns), ("flush", flush), ("growth", growth)) if found is None]
    if missing:
        sys.exit("bench: nothing to compute from; first run " + ", ".join(f"scripts/bench {name}" for name in missing))
    tables = {
        "turns": turns_table(turns),
        "targets": targets_table([*turns["targets"], *flush["targets"], *growth["targets"]]),
        "sizing": sizing_table(read(turns, flush, growth)),
    }
    for text in tables.values():
        print(text)
    if options.write:
        write(tables)


def read(turns: Any, flush: Any, growth: Any) -> Measured:
    """The figures at 50 stored messages. Raises SystemExit when a run left them out."""
    message = next((one for one in turns["medians"] if (one["row"], one["history"]) == ("message", HISTORY)), None)
    empty = next((one for one in growth["sizes"] if (one["part"], one["size"]) == ("history", 0)), None)
    if message is None or empty is None:
        sys.exit("bench: sizing needs turns of the row message at history 50, and growth of the history from 0")
    return Measured(
        pod_per_s=message["turns_per_s"],
        worker_per_s=flush["median"]["worker_per_s"],
        redis_ms=message["redis_ms"],
        postgres_ms=message["postgres_ms"],
        empty_bytes=empty["bytes_each"],
        message_bytes=(growth["hot_bytes"] - empty["bytes_each"]) / HISTORY,
        stored_bytes=flush["median"]["bytes_each"],
    )


def size(rate: int, by: Measured) -> Size:
    """What so many turns a second need."""
    sessions = rate / TURNS_A_VISIT * (TURNS_A_VISIT * SECONDS_A_TURN + HOT_S)
    return Size(
        rate,
        ceil(rate / (by.pod_per_s * USED)),
        ceil(rate / (by.worker_per_s * USED)),
        rate * by.redis_ms / 1000 / USED,
        sessions * (by.empty_bytes + 2 * TURNS_A_VISIT * by.message_bytes),
        rate * by.postgres_ms / 1000 / USED,
        rate * DAY_S * by.stored_bytes,
    )


def sizing_table(by: Measured) -> str:
    """For each rate a row, the formulas, and what is the first to be too small."""
    lines = [
        "| turns a second | pods | workers | Redis: cores, memory | Postgres: cores, growth a day |",
        "|---|---|---|---|---|",
    ]
    for rate in RATES:
        one = size(rate, by)
        masters = f"{_cores(one.redis_cores)}" if one.redis_cores <= 1 else f"{ceil(one.redis_cores)} (Cluster)"
        lines.append(
            f"| {rate:,} | {one.pods:,} | {one.workers} | {masters}, {_bytes(one.redis_bytes)} |"
            f" {_cores(one.postgres_cores)}, {_bytes(one.day_bytes)} |"
        )
    each = by.empty_bytes + 2 * TURNS_A_VISIT * by.message_bytes
    visit_s = TURNS_A_VISIT * SECONDS_A_TURN
    one_redis, one_postgres = USED * 1000 / by.redis_ms, USED * 1000 / by.postgres_ms
    lines += [
        "",
        f"With a core each used to {USED:.0%}: pods = turns/s ÷ ({USED} × {by.pod_per_s:,.0f}), workers = turns/s ÷"
        f" ({USED} × {by.worker_per_s:,.0f}), Redis' cores = turns/s × {by.redis_ms:.2f} ms ÷ {USED}, Postgres' ="
        f" turns/s × {by.postgres_ms:.2f} ms ÷ {USED}.",
        f"Redis' memory = sessions × ({by.empty_bytes:,.0f} + messages × {by.message_bytes:,.0f}) bytes,"
        f" {each / 1000:.1f} KB for visits of {TURNS_A_VISIT} turns, one in {SECONDS_A_TURN} s; sessions at a time ="
        f" turns/s ÷ {TURNS_A_VISIT} × ({visit_s:,} s + `hot_ttl_s`, {HOT_S:,} s). To that comes the backlog"
        " (`GATEWAY_MAX_BACKLOG_BYTES`), and as much again while the append-only file is rewritten.",
        f"Postgres grows by {by.stored_bytes:,.0f} bytes a turn (some 100 and 400 characters, indexes included), until"
        " `retention_days` erases as much as comes.",
        f"What breaks first: Redis, which is one core, at {one_redis:,.0f} turns/s ({1000 / by.redis_ms:,.0f} with that core"
        f" full); from there on Redis Cluster. Then Postgres, a core of which takes {one_postgres:,.0f} turns/s, by its disk"
        " rather than by its cores. Pods and workers are added as needed.",
    ]
    return "\n".join(lines) + "\n"


def turns_table(turns: Any) -> str:
    """The rows by history: turns a second, and at 50 messages the latency and the server's processor time."""
    by = {(one["row"], one["history"]): one for one in turns["medians"]}
    histories = sorted({history for _, history in by})
    lines = [
        "| | "
        + " | ".join(f"history {history}" for history in histories)
        + " | p50, p99 ms | CPU ms: server, Redis, Postgres |",
        "|---|" + "---|" * len(histories) + "---|---|",
    ]
    for row, name in ROWS.items():
        there = [history for history in histories if (row, history) in by]
        if not there:
            continue
        at = by[row, HISTORY if HISTORY in there else there[0]]
        figures = [f"{by[row, one]['turns_per_s']:,.0f}" if one in there else "" for one in histories]
        lines.append(
            f"| {name} | {' | '.join(figures)} | {at['p50_ms']:.0f}, {at['p99_ms']:.0f} |"
            f" {at['server_ms']:.2f}, {at['redis_ms']:.2f}, {at['postgres_ms']:.2f} |"
        )
    if turns["paced"]:
        names = {"message": "gateway", "limit": "limit"}
        paced = ", ".join(
            f"{names[one['row']]} {one['p99_ms']:.0f} ms at {one['rate']:,.0f}/s (history {one['history']})"
            for one in turns["paced"]
        )
        lines += ["", f"p99 at a fixed rate: {paced}."]
    lines += ["", f"Measured on {turns['machine']}."]
    return "\n".join(lines) + "\n"


def targets_table(targets: Sequence[Any]) -> str:
    """What has to be reached, and is or is not."""
    lines = ["| figure | is | has to be |", "|---|---|---|"]
    for one in targets:
        mark = "" if one["holds"] else " **missed**"
        lines.append(f"| {one['words']} | {one['value']:,.2f}{mark} | {one['sign']} {one['bound']:,.2f} |")
    return "\n".join(lines) + "\n"


def write(tables: Mapping[str, str]) -> None:
    """Replaces what is between `<!-- bench:<name> -->` and `<!-- end -->` in the README."""
    text = README.read_text()
    for name, table in tables.items():
        begin, end = f"<!-- bench:{name} -->\n", "<!-- end -->"
        head, found, rest = text.partition(begin)
        if not found:
            sys.exit(f"bench: the README has no mark {begin.strip()}")
        text = head + begin + "\n" + table + "\n" + end + rest.partition(end)[2]
    README.write_text(text)


def _cores(cores: float) -> str:
    return f"{cores:.1f}" if cores >= 0.1 else "< 0.1"


def _bytes(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if count >= 10 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
