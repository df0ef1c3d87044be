"""Which test files take long: `--quick` leaves them out, and a whole run begins with them."""

from pathlib import Path

FOLDERS = ("browser", "faults", "fuzz", "chaos", "attacks")
FILES = (
    "test_model",
    "test_erase",
    "test_cluster",
    "test_sentinel",
    "test_servers",
    "test_dev",
    "test_pgbouncer",
    "test_second_try",
)
"""By their names alone, wherever they are."""
FIRST = ("test_controls", "test_model", "test_rolling_restart", "test_access", "test_answers", "test_streams", "test_stores")


def takes_long(path: Path) -> bool:
    """Whether the tests in a file or folder take long: with real browsers, with servers that die, by the thousand."""
    return path.name in FOLDERS or path.stem in FILES


def rank(path: Path) -> int:
    """Where a file comes in a run: the longest first, so that the test processes end at the same time."""
    if path.stem in FIRST:
        return FIRST.index(path.stem)
    return len(FIRST) + (not takes_long(path) and not takes_long(path.parent))
