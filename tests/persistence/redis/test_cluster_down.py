"""No node of a cluster can be reached: workers and pods go on, calls are answered, and all recovers with the nodes."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from typing import Any

import asyncpg
import httpx
import pytest
from redis.asyncio import Redis
from redis.exceptions import RedisClusterException

from gateway.app import Pod, Stores, build_pod, build_worker
from gateway.dev.servers import redis as redis_module
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.settings import Settings
from persistence.errors import RedisUnavailable
from persistence.redis.connection import translated
from tests.conftest import TABLES, PutAgent, settings_for
from tests.support.layer import new_id
from tests.support.serving import served, wait_for


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_module.RedisCluster]:
    """A cluster of this module's own, that loses nothing when it is killed."""
    config = {"appendfsync": "always"}
    ports = [free_port() for _ in range(3)]
    with redis_module.RedisCluster(tmp_path_factory.mktemp("cluster"), ports, config=config) as cluster:
        yield cluster


@pytest.fixture
def settings(cluster: redis_module.RedisCluster, postgres_server: PostgresServer) -> Settings:
    return settings_for(cluster.url, postgres_server.url)


@pytest.fixture
async def empty(cluster: redis_module.RedisCluster, settings: Settings) -> None:
    for server in cluster.servers:
        async with Redis(port=server.port) as node:
            await node.flushall()
    connection = await asyncpg.connect(settings.database_url)
    await connection.execute(f"TRUNCATE {TABLES}")
    await connection.close()


@pytest.fixture
async def client(settings: Settings, stores: Stores) -> AsyncIterator[httpx.AsyncClient]:
    pod: Pod = await build_pod(settings, stores)
    async with served(pod) as client:
        yield client
        assert pod.supervisor.down == []


async def chat(client: httpx.AsyncClient, session_id: str, message: str) -> httpx.Response:
    body = {"message": message, "session_id": session_id, "message_id": message}
    return await client.post("/api/chat/shop/message", json=body)


async def test_pods_and_workers_outlive_it(
    cluster: redis_module.RedisCluster,
    settings: Settings,
    stores: Stores,
    client: httpx.AsyncClient,
    put_agent: PutAgent,
    rows: Any,
) -> None:
    await put_agent("shop")
    session_id = new_id()
    worker = await build_worker(settings, stores)
    working = asyncio.create_task(worker.run())
    assert (await chat(client, session_id, "before")).status_code == 200
    for server in cluster.servers:
        server.kill()
    try:

        async def refused() -> bool:
            answer = await chat(client, session_id, "meanwhile")
            assert (answer.status_code, answer.json()["code"]) == (503, "redis_unavailable"), answer.text
            return (await client.get("/readyz")).status_code == 503

        for _ in range(3):
            await wait_for(refused, "calls are answered, and the pod is not ready")
        assert not working.done()
    finally:
        for server in cluster.servers:
            server.start()

    async def answered() -> bool:
        return (await chat(client, session_id, "after")).status_code == 200

    async def ready() -> bool:
        return (await client.get("/readyz")).status_code == 200

    async def stored() -> bool:
        found = await rows("SELECT content FROM agent_messages WHERE role = 'user' ORDER BY seq")
        return [row["content"] for row in found][:: len(found) - 1 or 1] == ["before", "after"]

    await wait_for(answered, "turns are answered again", 30)
    await wait_for(ready, "the pod is ready again")
    await wait_for(stored, "the worker has flushed them", 30)
    assert not working.done()
    worker.stop()
    await working


def test_an_error_that_is_no_redis_error_is_redis_that_is_away() -> None:
    with pytest.raises(RedisUnavailable), translated():
        raise RedisClusterException("Redis Cluster cannot be connected")
