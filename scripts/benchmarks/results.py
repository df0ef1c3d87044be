"""What the measurements leave in .bench: figures as JSON, and how they compare with what has to be reached."""

import os
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from scripts.benchmarks.measure import FOLDER


class Target(msgspec.Struct, frozen=True):
    """A figure, what it has to be at least or at most, and whether it is."""

    words: str
    value: float
    sign: str
    bound: float
    holds: bool

    @classmethod
    def at_least(cls, words: str, value: float, bound: float) -> "Target":
        return cls(words, value, "≥", bound, value >= bound)

    @classmethod
    def at_most(cls, words: str, value: float, bound: float) -> "Target":
        return cls(words, value, "≤", bound, value <= bound)


def print_targets(targets: Sequence[Target]) -> None:
    """Each with its figure; those that are not reached stand out, and last comes how many those are."""
    if not targets:
        return
    print("\ntargets:")
    for one in targets:
        mark = "ok    " if one.holds else "MISSED"
        print(f"  {mark}  {one.words:<88}{one.value:>8.2f}  {one.sign} {one.bound:.2f}")
    missed = sum(not one.holds for one in targets)
    print(f"  {len(targets) - missed} of {len(targets)} reached" + (f", {missed} MISSED" if missed else ""))


def machine() -> str:
    """What it was measured on, in a line."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC"


def save(name: str, figures: Any) -> None:
    """Writes .bench/<name>.json."""
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(figures), indent=2) + b"\n")


def saved(name: str) -> Any:
    """What was written there, or None."""
    file = FOLDER / f"{name}.json"
    return msgspec.json.decode(file.read_bytes()) if file.exists() else None
