"""How many times faster one row is than another: the median of the rounds' own ratios, and how far those lie apart.

A machine's speed moves by a third within seconds. The rows of one round meet the same moments, so their ratio says more than
that of two medians.
"""

from collections.abc import Iterator, Mapping, Sequence
from statistics import median, quantiles
from typing import NamedTuple

from scripts.benchmarks.measure import BESIDE, GATEWAY, Result

BASES = {"limit": "times the limit", "limit-tuned": "times the tuned limit"}


class Ratio(NamedTuple):
    """The median of the rounds' ratios, and the quartiles around it."""

    middle: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3f} ({self.low:.3f} to {self.high:.3f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
    """Of two rows, both with a figure for each round, in the same order."""
    ratios = [our / their for our, their in zip(ours, theirs, strict=True)]
    if len(ratios) < 2:
        return Ratio(ratios[0], ratios[0], ratios[0])
    low, _, high = quantiles(ratios, n=4, method="inclusive")
    return Ratio(median(ratios), low, high)


def ratio_lines(results: Sequence[Result], names: Mapping[str, str]) -> Iterator[str]:
    """The gateway's rows at one history length beside the limits, and beside those of the other checkout, as text."""
    per_s: dict[str, list[float]] = {}
    server_ms: dict[str, list[float]] = {}
    for one in results:
        per_s.setdefault(one.row, []).append(one.turns_per_s)
        server_ms.setdefault(one.row, []).append(one.server_ms)
    bases = [base for base in BASES if base in per_s]
    yield "turns/s, in each round beside what was measured in the same round: median (quartiles)"
    yield f"{'':<42}{'turns/s':>9}" + "".join(f"{BASES[base]:>28}" for base in bases)
    for row in GATEWAY:
        if row in per_s:
            beside = "".join(f"{ratio(per_s[row], per_s[base])!s:>28}" for base in bases)
            yield f"{names[row]:<42}{median(per_s[row]):>9,.0f}{beside}"
    for row in GATEWAY:
        if row in per_s and BESIDE + row in per_s:
            other = BESIDE + row
            yield (
                f"{names[row]}, times the other checkout's: turns/s {ratio(per_s[row], per_s[other])},"
                f" the server's CPU per turn {ratio(server_ms[row], server_ms[other])}"
            )
