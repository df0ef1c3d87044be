"""The retry rule: how often, until when and after which pause a failed operation is tried again."""

from time import monotonic

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persistence.redis.connection import BACKOFF, RETRIES, connect
from persistence.retry import Attempts, Backoff


class Passing(Exception):
    """An error that may pass."""


def pauses(attempts: Attempts) -> list[float]:
    """The pauses that `attempts` allows before it raises the error it was given."""
    allowed: list[float] = []
    error = Passing()
    with pytest.raises(Passing) as raised:
        while len(allowed) < 1000:
            allowed.append(attempts.next_pause_s(error))
    assert raised.value is error
    return allowed


def test_pauses_grow_up_to_the_longest() -> None:
    backoff = Backoff(0.2, 2.0)
    assert [backoff.pause_s(failures) for failures in range(1, 7)] == [0.2, 0.4, 0.8, 1.6, 2.0, 2.0]
    assert [Backoff(1, 100, factor=3).pause_s(failures) for failures in range(1, 6)] == [1, 3, 9, 27, 81]
    assert [Backoff(0.2, 0.2).pause_s(failures) for failures in (1, 2, 3)] == [0.2, 0.2, 0.2]
    assert Backoff(3600, 2).pause_s(1) == 2


def test_a_pause_after_very_many_failures_is_the_longest() -> None:
    assert Backoff(0.2, 2.0).pause_s(1_000_000) == 2.0
    assert Backoff(0, 2.0).pause_s(1_000_000) == 0


@given(st.integers(1, 100), st.floats(0, 10), st.floats(0, 100))
def test_with_jitter_a_pause_is_a_part_of_that_without(failures: int, first_s: float, most_s: float) -> None:
    assert 0 <= Backoff(first_s, most_s, jitter=True).pause_s(failures) <= Backoff(first_s, most_s).pause_s(failures)


def test_with_jitter_calls_that_failed_together_do_not_come_back_together() -> None:
    backoff = Backoff(1, 1, jitter=True)
    assert len({backoff.pause_s(1) for _ in range(100)}) > 90


def test_a_limit_is_the_number_of_retries() -> None:
    assert pauses(Attempts(Backoff(0.1, 0.1), limit=2)) == [0.1, 0.1]
    assert pauses(Attempts(Backoff(0.1, 0.1), limit=0)) == []


def test_without_limits_it_is_tried_for_ever() -> None:
    attempts = Attempts(Backoff(0.1, 0.1))
    assert [attempts.next_pause_s(Passing()) for _ in range(500)] == [0.1] * 500


def test_there_is_no_attempt_that_would_begin_behind_the_deadline() -> None:
    assert pauses(Attempts(Backoff(60, 60), deadline_s=monotonic() + 30)) == []
    assert pauses(Attempts(Backoff(0, 0), deadline_s=monotonic() - 1)) == []
    assert pauses(Attempts(Backoff(10, 60), deadline_s=monotonic() + 30)) == [10, 20]  # as if no time passed: 40 is beyond
    assert pauses(Attempts(Backoff(0, 0), limit=3, deadline_s=monotonic() + 3600)) == [0, 0, 0]


def test_after_a_success_failures_are_counted_from_the_first() -> None:
    attempts = Attempts(Backoff(0.1, 10), limit=2)
    assert [attempts.next_pause_s(Passing()) for _ in range(2)] == [0.1, 0.2]
    attempts.reset()
    assert attempts.failures == 0
    assert pauses(attempts) == [0.1, 0.2]


async def test_a_pause_is_waited_for() -> None:
    attempts = Attempts(Backoff(0.05, 0.05), limit=1)
    began = monotonic()
    await attempts.pause(Passing())
    assert monotonic() - began >= 0.045
    with pytest.raises(Passing):
        await attempts.pause(Passing())
    assert attempts.failures == 2


def test_redis_py_follows_the_same_rule_when_it_connects() -> None:
    retry = connect("redis://host").connection_pool.connection_kwargs["retry"]  # type: ignore[union-attr]
    assert retry._retries == RETRIES
    longest_s = Backoff(BACKOFF.first_s, BACKOFF.most_s)
    for failures in range(1, 6):
        assert all(0 <= retry._backoff.compute(failures) <= longest_s.pause_s(failures) for _ in range(50))
