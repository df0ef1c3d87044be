"""Which tests take long: `--quick` leaves them out, and a whole run begins with them."""

from pathlib import Path

import pytest

FOLDERS = ("browser", "faults", "shards", "fuzz", "chaos", "attacks", "dev")
FILES = (
    "test_model",
    "test_erase",
    "test_cluster",
    "test_sentinel",
    "test_pgbouncer",
    "test_second_try",
    "test_package",
    "test_servers",
    "test_dev",
    "test_cli",
    "test_chat",
    "test_drain",
    "test_token_damage",
)
"""By their names alone, in whichever folder."""
TESTS = (
    "test_with_half_of_all_calls_cancelled_no_value_is_wrong",
    "test_with_half_of_all_calls_cancelled_no_value_is_wrong_on_a_cluster",
    "test_a_hundred_sessions_at_once_never_see_each_other",
    "test_500_idle_streams_on_a_pod_are_one_connection_and_little_memory",
    "test_a_slow_reader_slows_nobody_and_holds_no_memory",
    "test_no_body_makes_a_5xx_or_a_dead_letter",
    "test_a_client_that_leaves_replies_behind_shows_nobody_a_wrong_value",
    "test_a_change_of_an_agent_is_on_every_pod_within_seconds",
    "test_a_graph_that_swallows_its_cancellation_does_not_keep_a_pod_from_ending",
    "test_a_graph_that_exits_ends_its_turn_and_not_the_pod",
)
FIRST = (
    "test_controls",
    "test_controls_failover",
    "test_model",
    "test_rolling_restart",
    "test_access",
    "test_answers",
    "test_streams",
    "test_stores",
)


def takes_long(path: Path) -> bool:
    """Whether the tests in a file or folder take long: with real browsers, with servers that die, by the thousand."""
    return path.name in FOLDERS or path.stem in FILES


def quick(item: pytest.Item) -> bool:
    """Whether a test of a file that does not take long is quick too."""
    return item.name.partition("[")[0] not in TESTS


def rank(path: Path) -> int:
    """Where a file comes in a run: the longest first, so that the test processes end at the same time."""
    if path.stem in FIRST:
        return FIRST.index(path.stem)
    return len(FIRST) + (not takes_long(path) and path.parent.name not in FOLDERS)
