"""The supervisor alone; tests/faults/test_tasks.py has it at work."""

import asyncio

import pytest
from structlog.testing import capture_logs

from persistence.errors import Damaged
from persistence.supervisor import Supervisor, told
from tests.support.serving import wait_for


def test_of_an_error_that_nobody_foresaw_only_the_type_is_told() -> None:
    """Its text may quote a visitor."""
    assert told(KeyError("a visitor's words")) == "KeyError"
    assert told(Damaged("session gs_…", "turns", "is missing")) == "Damaged: session gs_…: field turns: is missing"


@pytest.mark.parametrize(
    "error", [KeyError("words"), ExceptionGroup("words", [ValueError("words")]), asyncio.CancelledError()]
)
async def test_whatever_ends_a_task_from_within_starts_it_again(error: BaseException) -> None:
    tasks, starts = Supervisor(), [0]

    async def run() -> None:
        starts[0] += 1
        raise error

    with capture_logs() as lines:
        tasks.start("limits", run)
        await wait_for(lambda: starts[0] >= 3, "it is started again")
    assert tasks.down == ["limits"]
    assert not any("words" in line["error"] for line in lines)
    await tasks.stop()
    seen = starts[0]
    await asyncio.sleep(0)
    assert starts[0] == seen, "stopped is stopped"
