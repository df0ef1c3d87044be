"""Controls of what holds when Redis has forgotten something: without one of these guards the chaos is red."""

from pathlib import Path

import pytest

from tests.chaos.report import report
from tests.chaos.run import run
from tests.faults.test_controls import ASLEEP, LATE, Control, Edit, options, tree

FORGOTTEN = {"lost", "doubled", "out_of_order", "left_over", "unexpected"}
"""What shows when nobody compares a Redis that has forgotten with Postgres."""

UNNOTICED = Edit(
    "persistence/lua/settle.lua",
    "local over = epoch == 0 or server ~= args.server or ",
    "local over = epoch == 0 or ",
)
"""A server that was started again, or promoted, is taken for the one before."""
UNRESCUED = Edit(
    "persistence/rescue.py",
    "                while monotonic() - began_at < LAST_S:\n",
    "                while False:\n",
)
"""The records of a former master are left where they are."""

CONTROLS = {
    "Redis has forgotten what Postgres knows, and nobody looks": Control([UNNOTICED], ("rollback",), FORGOTTEN, seconds=20),
    "a turn whose place another has dies": Control(
        [UNNOTICED, Edit("persistence/repair.py", '("idx_messages_session", "idx_sessions_session_id")', "()")],
        ("rollback",),
        {"lost", "left_over"},
        seconds=20,
    ),
    "a demoted master is written to": Control(
        [
            Edit("persistence/watch.py", "        await self._scripts.check_servers()\n", ""),
            Edit("persistence/redis/pool.py", "return master is not None and (getattr(", "return False and (getattr("),
            UNRESCUED,
            LATE,
            ASLEEP,
        ],
        ("failover-planned",),
        FORGOTTEN,
        seconds=30,
        topology="sentinel",
    ),
    "what a former master answered is left with it": Control(
        [UNRESCUED, LATE, ASLEEP], ("failover-planned",), FORGOTTEN, seconds=40, topology="sentinel"
    ),
    "a turn is answered before a replica has it": Control(
        [Edit("persistence/redis/scripts.py", "if durable and self._replicas:", "if False:"), LATE, ASLEEP],
        ("replicas-cut-off",),
        {"lost"},
        seconds=40,
        topology="sentinel",
        replicas=1,
    ),
}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", CONTROLS)
async def test_without_its_guard_the_chaos_is_red(name: str, tmp_path: Path) -> None:
    control = CONTROLS[name]
    outcome = await run(options(control, tree(tmp_path / "source", control.edits)))
    assert set(outcome.verdict.breaches()) & control.kinds, report(outcome)
