"""What the chaos counts as a wait, and what excuses one: the disk that Redis waits for, and nothing else."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from redis.asyncio import Redis

from gateway.dev.servers.ports import free_port
from gateway.dev.servers.redis import RedisServer
from tests.chaos.harm import Window
from tests.chaos.ledger import Conversation, DiskStall, Ledger, Message
from tests.chaos.unavailability import limits_broken, seen
from tests.chaos.watch import note_disk_stalls

KILLED = Window(("pod-killed",), began_at=100, mended_at=102, calm_at=107, ended_at=107, victims={"hit"})
DELAYED = Window(("replies-delayed",), began_at=107, mended_at=111, calm_at=113, ended_at=113)
BUSY = "local sum = 0 for i = 1, 50000000 do sum = sum + i end return sum"


def waited(session_id: str, sent_at: float, answered_at: float, stall: DiskStall | None = None) -> list[str]:
    """The limits that one answered message breaks."""
    message = Message(1, "", 0, sent_at, answer="yes", answered_at=answered_at)
    ledger = Ledger()
    ledger.conversations.append(Conversation(session_id, "", "usual", messages=[message]))
    if stall:
        ledger.disk_stalls["aof-write", 1] = stall
    return limits_broken(seen([KILLED, DELAYED], ledger), 5)


def test_a_wait_beyond_the_lease_is_a_breach() -> None:
    assert waited("hit", 99, 104.9) == []
    assert waited("hit", 99, 106) == ["pod-killed: a session on the pod waited 7.0 s, the lease is 5 s"]
    assert waited("other", 101, 105) == ["pod-killed: a session that it did not hit waited 4.0 s"]


def test_the_disk_excuses_its_own_time() -> None:
    assert waited("hit", 99, 106, stall=DiskStall(105, 1.8)) == []
    assert waited("hit", 99, 106, stall=DiskStall(105, 0.4)) != [], "too short for what is missing"
    assert waited("hit", 99, 106, stall=DiskStall(120, 1.8)) != [], "after the answer"
    assert waited("hit", 99, 106, stall=DiskStall(97, 1.8)) != [], "before the message"
    assert waited("hit", 99, 112, stall=DiskStall(105, 1.8)) != []


def test_what_is_sent_when_all_is_calm_meets_the_next_fault() -> None:
    ended_late = Window(("pod-killed",), began_at=100, mended_at=102, calm_at=107, ended_at=109)
    message = Message(1, "", 0, 108.5, answer="yes", answered_at=113)
    ledger = Ledger()
    ledger.conversations.append(Conversation("hit", "", "usual", messages=[message]))
    after = Window(("replies-delayed",), began_at=109, mended_at=111, calm_at=113, ended_at=113)
    assert [(kind.name, kind.others_s) for kind in seen([ended_late, after], ledger)] == [
        ("pod-killed", 0),
        ("replies-delayed", 4.5),
    ]
    message.sent_at = 106.9
    assert limits_broken(seen([ended_late, after], ledger), 5) == ["pod-killed: a session that it did not hit waited 6.1 s"]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[RedisServer]:
    config = {"appendfsync": "always", "latency-monitor-threshold": "1"}
    server = RedisServer(tmp_path / "redis", free_port(), config=config)
    server.start()
    yield server
    server.stop()


async def test_redis_tells_what_its_disk_took_from_what_commands_took(server: RedisServer) -> None:
    ledger = Ledger()
    async with Redis(port=server.port) as client:
        await cast(Any, client).eval(BUSY, 0)
        await note_disk_stalls(client, ledger)
        assert [second for second, took_ms in await client.latency_history("command") if took_ms >= 50]
        assert not ledger.disk_stalls, "a slow command excuses nobody"
        for _ in range(30):
            await client.set("key", b"x" * 1_000_000)
        await note_disk_stalls(client, ledger)
    assert ledger.disk_stalls, "thirty megabytes were on the disk within a millisecond each"
