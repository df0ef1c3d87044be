"""A Redis Cluster without replicas, one shard of which dies or hangs."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager

import asyncpg
import httpx
import pytest
from redis.asyncio import Redis, RedisCluster

from gateway.app import Stores
from gateway.dev.servers import redis as redis_module
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from persistence.model.agents import Agent
from tests.conftest import TABLES, PutAgent, settings_for
from tests.support.serving import wait_for
from tests.support.visiting import new_session_id, say

Dead = Callable[[], AbstractAsyncContextManager[None]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_module.RedisCluster]:
    """Three masters without replicas, each of which serves on when another is away."""
    config = {"cluster-require-full-coverage": "no"}
    ports = [free_port() for _ in range(3)]
    with redis_module.RedisCluster(tmp_path_factory.mktemp("cluster"), ports, config=config) as cluster:
        yield cluster


@pytest.fixture
def settings(cluster: redis_module.RedisCluster, postgres_server: PostgresServer) -> Settings:
    return settings_for(cluster.url, postgres_server.url)


@pytest.fixture
async def empty(cluster: redis_module.RedisCluster, settings: Settings) -> None:
    """Empties every node and the tables."""
    for server in cluster.servers:
        async with Redis(port=server.port) as node:
            await node.flushall()
    connection = await asyncpg.connect(settings.database_url)
    await connection.execute(f"TRUNCATE {TABLES}")
    await connection.close()


@pytest.fixture
def dying(cluster: redis_module.RedisCluster) -> RedisServer:
    return cluster.servers[2]


@pytest.fixture(params=["killed", "hangs"])
def dead(request: pytest.FixtureRequest, cluster: redis_module.RedisCluster, dying: RedisServer) -> Dead:
    """While one shard is away; afterwards the cluster is whole again."""

    @asynccontextmanager
    async def dead() -> AsyncIterator[None]:
        killed = request.param == "killed"
        await asyncio.to_thread(dying.kill if killed else dying.pause)
        try:
            yield
        finally:
            await asyncio.to_thread(dying.start if killed else dying.resume)
            await wait_for(lambda: asyncio.to_thread(cluster.is_whole), "the cluster is whole again")

    return dead


def is_on(stores: Stores, key: str, server: RedisServer) -> bool:
    assert isinstance(stores.client, RedisCluster)
    node = stores.client.get_node_from_key(key)
    return node is not None and node.port == server.port


@pytest.fixture
async def shop(stores: Stores, put_agent: PutAgent, dying: RedisServer) -> Agent:
    """An agent whose copy lies on the shard that will die."""
    for number in range(100):
        agent = await put_agent(f"shop-{number}")
        if is_on(stores, stores.keys.agent(agent.id), dying):
            return agent
    raise AssertionError("no agent on this shard")


async def sessions_on(
    client: httpx.AsyncClient, stores: Stores, agent: Agent, dying: RedisServer, *, healthy: bool
) -> list[str]:
    """Six sessions on the two shards that stay, or on the one that dies, each with a turn."""
    found: list[str] = []
    while len(found) < 6:
        session_id = new_session_id()
        if is_on(stores, stores.keys.session(session_id), dying) != healthy:
            await say(client, session_id, agent=agent.name)
            found.append(session_id)
    return found


async def healthy_sessions(client: httpx.AsyncClient, stores: Stores, agent: Agent, dying: RedisServer) -> list[str]:
    """Sessions on the two shards that stay, each with a turn."""
    return await sessions_on(client, stores, agent, dying, healthy=True)
