"""What a process says at its start of a master whose replicas protect too little; else see tests/faults/test_replicas.py."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from gateway.dev.servers.ports import HOST, free_port
from gateway.dev.servers.process import wait_until
from gateway.dev.servers.redis import RedisServer
from persistence.redis.connection import connect
from persistence.redis.keys import Keys
from persistence.redis.server_check import check_server

STRICT = {"min-replicas-to-write": "1", "min-replicas-max-lag": "1"}


@pytest.fixture(scope="module")
def master(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("master"), free_port(), config={"repl-diskless-sync-delay": "0"}) as server:
        yield server


@contextmanager
def replicated(master: RedisServer, directory: Path) -> Iterator[None]:
    """The master has a replica meanwhile."""
    with RedisServer(directory, free_port(), config={"replicaof": f"{HOST} {master.port}"}) as replica:
        assert wait_until(replica.follows, 15), "the replica follows"
        yield
    assert wait_until(lambda: master.facts("INFO", "replication")["connected_slaves"] == "0", 15), "the replica is gone"


async def said(master: RedisServer, replicas: int = 0) -> Sequence[Any]:
    """What a process logs when it starts."""
    client = connect(master.url)
    with capture_logs() as logs:
        await check_server(client, Keys("gw", 1), replicas=replicas)
    await client.aclose()
    return logs


@pytest.mark.parametrize(
    "config",
    [{}, {"min-replicas-to-write": "1"}, {"min-replicas-max-lag": "1"}],
    ids=["nothing set", "a long lag", "no replica needed"],
)
async def test_a_master_that_goes_on_without_its_replicas_is_warned_about(
    master: RedisServer, tmp_path: Path, config: dict[str, str]
) -> None:
    defaults = {"min-replicas-to-write": "0", "min-replicas-max-lag": "10"}
    for name, value in (defaults | config).items():
        master.ask("CONFIG", "SET", name, value)
    with replicated(master, tmp_path):
        (line,) = await said(master)
    assert (line["event"], line["log_level"]) == ("redis.writes_alone", "warning")
    assert line["remedy"] == "CONFIG SET min-replicas-to-write 1 min-replicas-max-lag 1"


async def test_one_that_takes_no_writes_without_them_is_not(master: RedisServer, tmp_path: Path) -> None:
    # Before it has a replica it takes no writes at all.
    with replicated(master, tmp_path):
        for name, value in STRICT.items():
            master.ask("CONFIG", "SET", name, value)
        assert await said(master, replicas=1) == []
        master.ask("CONFIG", "SET", "min-replicas-to-write", "0")


async def test_a_master_alone_is_only_warned_about_if_it_should_have_replicas(master: RedisServer) -> None:
    assert await said(master) == []
    (line,) = await said(master, replicas=2)
    assert (line["event"], line["log_level"]) == ("redis.too_few_replicas", "warning")
    assert (line["replicas"], line["wanted"], line["consequence"]) == (0, 2, "turns are not answered")
    assert "GATEWAY_REDIS_REPLICAS" in line["remedy"]
