"""Wake-ups over a connection that hangs, on a cluster and on a single Redis; faults that nobody foresees."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from time import monotonic

import pytest
from redis.asyncio import Redis
from structlog.testing import capture_logs

from gateway.dev.servers import redis as redis_module
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.redis import RedisServer
from persistence import supervisor
from persistence.redis import wakeups as module
from persistence.redis.connection import connect
from persistence.redis.keys import Keys
from persistence.redis.wakeups import WakeUps
from persistence.supervisor import Supervisor
from tests.support.links import Link
from tests.support.serving import wait_for

KEYS = Keys("gw", 1)
LIMIT_S = module.SILENCE_S + module.PONG_S + 2.5
"""A silence, the time for a pong, a new connection, and what a busy machine adds."""


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_module.RedisCluster]:
    config = {"cluster-require-full-coverage": "no"}
    ports = [free_port() for _ in range(3)]
    with redis_module.RedisCluster(tmp_path_factory.mktemp("cluster"), ports, config=config) as cluster:
        yield cluster


@asynccontextmanager
async def listening(url: str) -> AsyncIterator[tuple[WakeUps, list[str]]]:
    """Wake-ups at work, and what their control channel has said."""
    client, heard = connect(url), list[str]()
    wakeups, tasks = WakeUps(client, KEYS), Supervisor()
    tasks.start("wakeups", lambda: wakeups.run(heard.append))
    try:
        await wait_for(lambda: heard, "the subscription is confirmed")
        yield wakeups, heard
    finally:
        await tasks.stop()
        await client.aclose()


async def publish_until_heard(port: int, heard: list[str], word: str, limit_s: float) -> None:
    async with Redis(port=port) as publisher:

        async def published() -> bool:
            await publisher.publish(KEYS.control, word)
            return word in heard

        await wait_for(published, f"{word} is heard", limit_s)


async def test_a_hung_node_of_a_cluster_is_left_for_another(cluster: redis_module.RedisCluster) -> None:
    """Whichever it was: the subscription must not come back to it, which would take new connections."""
    with capture_logs() as lines:
        async with listening(cluster.url) as (wakeups, heard):
            node = wakeups._pubsub.node.name
            hung = next(server for server in cluster.servers if str(server.port) in node)
            healthy = next(server for server in cluster.servers if server is not hung)
            hung.pause()
            try:
                await publish_until_heard(healthy.port, heard, "after", LIMIT_S)
                assert wakeups._pubsub.node.name != node
            finally:
                hung.resume()
    assert [line["event"] for line in lines if "no pong" in line.get("error", "")] == ["wakeups.failed"]


async def test_a_frozen_link_is_left_for_a_new_connection(redis_server: RedisServer) -> None:
    async with Link(redis_server.url) as link:
        with capture_logs() as lines:
            async with listening(link.url) as (wakeups, heard):
                heard.clear()
                link.freeze()
                began = monotonic()
                await wait_for(lambda: not wakeups.listening, "the connection is given up", LIMIT_S)
                assert monotonic() - began >= module.PONG_S
                link.thaw()
                # '' is told first: messages may have been missed meanwhile.
                await wait_for(lambda: heard, "the readers are told to look", 5)
                assert heard[0] == ""
                await publish_until_heard(redis_server.port, heard, "after", 5)
    assert any("no pong" in line.get("error", "") for line in lines)


async def test_control_without_the_ping_a_frozen_link_is_believed(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PONG_S", 60.0)
    async with Link(redis_server.url) as link, listening(link.url) as (wakeups, _):
        link.freeze()
        with pytest.raises(AssertionError, match="given up"):
            await wait_for(lambda: not wakeups.listening, "the connection is given up", LIMIT_S)
        link.heal()


async def test_faults_in_a_row_that_nobody_foresaw_are_the_tasks(
    redis_server: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pod is not ready then, and is again once the task works."""
    monkeypatch.setattr(supervisor, "STEADY_S", 0.5)
    client, heard = connect(redis_server.url), list[str]()
    wakeups, tasks = WakeUps(client, KEYS), Supervisor()
    make, broken = wakeups._make_pubsub, asyncio.Event()
    broken.set()

    async def fails() -> object:
        if broken.is_set():
            raise KeyError("unforeseen")
        return await make()

    monkeypatch.setattr(wakeups, "_make_pubsub", fails)
    tasks.start("wakeups", lambda: wakeups.run(heard.append))
    await wait_for(lambda: tasks.down == ["wakeups"], "the task is down")
    broken.clear()
    await wait_for(lambda: tasks.down == [] and wakeups.listening, "the task works again")
    await publish_until_heard(redis_server.port, heard, "once", 5)
    assert len(wakeups._callbacks[KEYS.control]) == 1, "each message is told once, however often the task was started"
    await tasks.stop()
    await client.aclose()
