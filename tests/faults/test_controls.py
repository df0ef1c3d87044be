"""The chaos can fail: with any one guard taken out of the gateway, the same run finds what the guard is there for.

Pods and workers run from a copy of the source in which the guard is missing. Nothing is left to chance: where the guard
matters for a moment only, the copy makes the moment longer; where it matters for one reply, key or field, the fault goes for
that until it has hit. With all guards in place the same faults and the same long moments break nothing.
"""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.chaos.options import Options, Topology
from tests.chaos.report import report
from tests.chaos.run import run
from tests.support.serving import ROOT


@dataclass(frozen=True)
class Edit:
    """A text in a file of the source, and what stands there instead."""

    file: str
    old: str
    new: str


LATE = Edit(
    "persistence/flusher.py",
    "            async with self._postgres.transaction(FLUSH_TIMEOUT_S) as transaction:\n",
    "            await asyncio.sleep(3)\n"
    "            async with self._postgres.transaction(FLUSH_TIMEOUT_S) as transaction:\n",
)
"""More time between a record and Postgres."""
ASLEEP = Edit("persistence/flusher.py", "from math import ceil\n", "import asyncio\nfrom math import ceil\n")
SLOW = Edit(
    "persistence/flusher.py",
    "        await self._outbox.mark_flushed(partition, records, epoch)\n",
    "        await asyncio.sleep(0.7)\n        await self._outbox.mark_flushed(partition, records, epoch)\n",
)
"""More time between what Postgres has committed and what Redis knows of it."""
UNSENT = Edit(
    "gateway/turns/turn.py",
    "                committed = await store.commit(",
    "                await asyncio.sleep(0.3)\n                committed = await store.commit(",
)
"""More time before a commit is sent, so that a pod is killed with it."""


@dataclass(frozen=True)
class Control:
    """A guard taken out by `edits`, the faults against which it stands, and the kinds of breach that then show."""

    edits: Sequence[Edit]
    faults: tuple[str, ...]
    kinds: set[str]
    seconds: float = 10
    eviction: str = "volatile-lru"
    workers: int = 2
    work_ms: tuple[int, ...] = (0, 100, 300)
    memory_share: float = 0.97
    once: bool = False
    topology: Topology = "single"
    replicas: int = 0
    min_replicas: bool = False


CONTROLS = {
    "the answer is given before its record is on the outbox": Control(
        [
            Edit(
                "gateway/turns/turn.py",
                "        await self._commit(begun, stored, output.context, part)\n",
                "        later = asyncio.create_task(self._commit(begun, stored, output.context, part))\n"
                "        await asyncio.wait({later}, timeout=0)\n",
            ),
            UNSENT,
        ],
        ("pod-killed",),
        {"lost"},
    ),
    "a record is acknowledged before it is in Postgres": Control(
        [
            Edit(
                "persistence/flusher.py",
                "        if not records:\n            return 0, 0\n",
                "        if not records:\n            return 0, 0\n"
                "        await self._outbox.mark_flushed(partition, records, epoch)\n",
            ),
            LATE,
            ASLEEP,
        ],
        ("worker-killed",),
        {"lost"},
        seconds=15,
        workers=1,
    ),
    "no key is unique": Control(
        [
            Edit(
                "persistence/migrations/0001_tables.sql",
                "CREATE TABLE agent_messages (\n    id uuid PRIMARY KEY,",
                "CREATE TABLE agent_messages (\n    id uuid,",
            ),
            Edit("persistence/migrations/0001_tables.sql", "CREATE UNIQUE INDEX idx_messages", "CREATE INDEX idx_messages"),
            Edit("persistence/sql/flush.sql", "    ON CONFLICT (id) DO NOTHING\n", ""),
            SLOW,
            ASLEEP,
        ],
        ("worker-killed",),
        {"doubled"},
        seconds=15,
        workers=1,
    ),
    "the fence is ignored": Control(
        [
            Edit(
                "persistence/lua/commit.lua",
                "if turn_id ~= args.turn_id or fence ~= args.fence then\n",
                "if false and (turn_id ~= args.turn_id or fence ~= args.fence) then\n",
            ),
            Edit(
                "persistence/lua/renew.lua",
                "if held[1] ~= args.turn_id or held[2] ~= args.fence then",
                "if false and args.turn_id == args.fence then",
            ),
        ],
        ("pod-stalled",),
        {"lost", "doubled", "out_of_order", "left_over"},
        work_ms=(300, 1000),
    ),
    "the echo is not compared": Control(
        [
            Edit(
                "persistence/redis/scripts.py",
                "            and reply[2] == nonce.encode()\n            and reply[1] == session_id.encode()\n",
                "",
            ),
            Edit("persistence/redis/scripts.py", '(fields and fields.get(b"session_id") != session_id.encode())', "False"),
            Edit("persistence/redis/sessions.py", 'if fields.get(b"turn") != turn_id.encode():', "if False:"),
        ],
        ("replies-misplaced",),
        {"foreign"},
    ),
    "Redis may evict anything": Control(
        [Edit("persistence/redis/server_check.py", 'if policy.startswith("allkeys"):', "if False:"), LATE, ASLEEP],
        ("redis-full-evicting",),
        {"lost", "out_of_order", "left_over"},
        eviction="allkeys-lru",
        memory_share=0.6,  # less than is used without any key: all of them go, the outbox too
        workers=1,
    ),
    "a session leaves Redis while its turns are queued": Control(
        [
            Edit(
                "persistence/lua/lib/set_expiry.lua",
                "  if unflushed ~= '' or turn ~= '' then\n",
                "  if turn ~= '' then\n",
            ),
            Edit(
                "persistence/lua/lib/emit.lua",
                "  redis.call('PERSIST', key)\n",
                "  redis.call('PEXPIRE', key, session.hot_ttl_s * 1000)\n",
            ),
            Edit(
                "persistence/lua/commit.lua",
                "redis.call('ZREM', running_key, args.session_id)\n",
                "redis.call('ZREM', running_key, args.session_id)\nredis.call('PEXPIRE', session_key, 1000)\n",
            ),
            LATE,
            ASLEEP,
        ],
        ("expiry-of-a-second",),
        {"out_of_order", "left_over", "lost"},
        workers=1,
    ),
    "a message that was answered is answered anew": Control(
        [Edit("persistence/lua/begin.lua", "if args.message_id ~= '' then", "if false then")],
        ("worker-killed",),
        {"doubled"},
    ),
    "what cannot be read is an empty session": Control(
        [
            Edit(
                "persistence/lua/lib/misplaced.lua",
                "local function misplaced(session)\n",
                "local function misplaced(session)\n"
                "  if not whole(session.turns) then session.turns, session.first_hot, session.flushed = '0', '1', '0' end\n",
            ),
            Edit(
                "persistence/model/codec.py",
                "    session = _read([raw.get(name",
                "    if not raw[b'turns'].isdigit():\n"
                "        raw = {**raw, b'turns': b'0', b'first_hot': b'1', b'flushed': b'0'}\n"
                "    session = _read([raw.get(name",
            ),
        ],
        ("field-damaged",),
        {"out_of_order"},
    ),
}


def tree(directory: Path, edits: Sequence[Edit]) -> Path:
    """A copy of the source with the edits made."""
    for package in ("gateway", "persistence"):
        shutil.copytree(ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    for edit in edits:
        file = directory / edit.file
        text = file.read_text()
        assert text.count(edit.old) == 1, f"{edit.file} no longer has, just once: {edit.old}"
        file.write_text(text.replace(edit.old, edit.new))
    return directory


def options(control: Control, source: Path) -> Options:
    return Options(
        seconds=control.seconds,
        faults=control.faults,
        visitors=16,
        workers=control.workers,
        work_ms=control.work_ms,
        lease_s=2,
        source=source,
        eviction=control.eviction,
        memory_share=control.memory_share,
        until=frozenset(control.kinds),
        once=control.once,
        topology=control.topology,
        replicas=control.replicas,
        min_replicas=control.min_replicas,
        together=0,
        patience_s=8,
        drain_s=10,
    )


@pytest.mark.timeout(180)
@pytest.mark.parametrize("name", CONTROLS)
async def test_without_its_guard_the_chaos_is_red(name: str, tmp_path: Path) -> None:
    control = CONTROLS[name]
    outcome = await run(options(control, tree(tmp_path / "source", control.edits)))
    assert set(outcome.verdict.breaches()) & control.kinds, report(outcome)


@pytest.mark.timeout(180)
async def test_with_every_guard_what_only_makes_moments_longer_breaks_nothing(tmp_path: Path) -> None:
    slowed = [
        control
        for control in CONTROLS.values()
        if control.topology == "single" and {LATE, SLOW, UNSENT} & set(control.edits)
    ]
    faults = tuple(dict.fromkeys([*(fault for control in slowed for fault in control.faults), "replies-misplaced"]))
    control = Control([LATE, SLOW, ASLEEP, UNSENT], faults, set(), seconds=0, once=True)
    outcome = await run(options(control, tree(tmp_path / "source", control.edits)))
    assert {window.names[0] for window in outcome.windows} == set(faults)
    assert not outcome.verdict.breaches(), report(outcome)
