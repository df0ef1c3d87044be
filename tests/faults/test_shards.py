"""One shard of a Redis Cluster dies or hangs: the sessions on the others do not notice, wherever their agent's copy lies."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from time import monotonic
from typing import Any

import asyncpg
import httpx
import pytest
from redis.asyncio import Redis, RedisCluster
from structlog.testing import capture_logs

from gateway.app import Stores
from gateway.definitions import FRESH_S, PATIENCE_S
from gateway.dev.servers import redis as redis_module
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from persistence.model.agents import Agent
from tests.conftest import TABLES, PutAgent, settings_for
from tests.support.serving import ADMIN, wait_for
from tests.support.visiting import new_session_id, post_message, problem, say

Dead = Callable[[], Any]
SLOW_S = 1.0
"""What a turn of a healthy shard may take on a busy machine."""


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
    node: Any = stores.client.get_node_from_key(key)
    return bool(node.port == server.port)


@pytest.fixture
async def shop(stores: Stores, put_agent: PutAgent, dying: RedisServer) -> Agent:
    """An agent whose copy lies on the shard that will die."""
    for number in range(100):
        agent = await put_agent(f"shop-{number}")
        if is_on(stores, stores.keys.agent(agent.id), dying):
            return agent
    raise AssertionError("no agent on this shard")


async def healthy_sessions(client: httpx.AsyncClient, stores: Stores, shop: Agent, dying: RedisServer) -> list[str]:
    """Sessions on the two other shards, each with a turn."""
    found: list[str] = []
    while len(found) < 6:
        session_id = new_session_id()
        if not is_on(stores, stores.keys.session(session_id), dying):
            await say(client, session_id, agent=shop.name)
            found.append(session_id)
    return found


async def visit(client: httpx.AsyncClient, sessions: list[str], shop: Agent) -> tuple[set[int], float]:
    """A message to each session; the status codes, and the longest time that one took."""

    async def one(session_id: str) -> tuple[int, float]:
        began = monotonic()
        answer = await post_message(client, session_id, agent=shop.name)
        return answer.status_code, monotonic() - began

    outcomes = await asyncio.gather(*map(one, sessions))
    return {status for status, _ in outcomes}, max(took_s for _, took_s in outcomes)


async def test_sessions_of_healthy_shards_are_answered_all_the_while(
    client: httpx.AsyncClient, stores: Stores, shop: Agent, dying: RedisServer, dead: Dead
) -> None:
    sessions = await healthy_sessions(client, stores, shop, dying)
    with capture_logs() as logs:
        async with dead():

            async def stale() -> list[Any]:
                status, slowest_s = await visit(client, sessions, shop)
                assert status == {200}
                assert slowest_s < PATIENCE_S + SLOW_S
                return [line for line in logs if line["event"] == "agents.stale"]

            await wait_for(stale, "the definition is stale")
            # Also when it is asked for again, and again in vain.
            later = monotonic() + 2 * FRESH_S + 2

            async def asked_again() -> bool:
                await stale()
                return monotonic() > later

            await wait_for(asked_again, "it was asked for again", 30)
    lines = [line for line in logs if line["event"] == "agents.stale"]
    assert [(line["agent"], line["log_level"]) for line in lines] == [(shop.name, "warning")]
    assert lines[0]["age_s"] >= FRESH_S


async def test_control_without_what_is_known_they_are_refused(
    client: httpx.AsyncClient,
    stores: Stores,
    shop: Agent,
    dying: RedisServer,
    dead: Dead,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sessions = await healthy_sessions(client, stores, shop, dying)
    monkeypatch.setattr(stores.agents, "find", stores.agent_copies.find)
    async with dead():
        status, _ = await visit(client, sessions, shop)
    assert status == {503}


async def test_a_pod_that_does_not_know_the_agent_asks_postgres(
    client: httpx.AsyncClient, stores: Stores, shop: Agent, dying: RedisServer, dead: Dead
) -> None:
    sessions = await healthy_sessions(client, stores, shop, dying)
    async with dead():
        stores.agents._definitions.clear()
        status, slowest_s = await visit(client, sessions, shop)
        assert status == {200}
        assert slowest_s < 2.0


async def test_an_agent_that_is_gone_stays_gone(
    client: httpx.AsyncClient, stores: Stores, shop: Agent, dying: RedisServer, dead: Dead
) -> None:
    (session_id, *_) = await healthy_sessions(client, stores, shop, dying)
    deleted = await client.delete(f"/api/agents/{shop.id}", headers=ADMIN)
    assert deleted.status_code == 204
    async with dead():
        for agent in (shop.name, shop.id):
            problem(await post_message(client, session_id, agent=agent), 404, "agent_not_found")


async def test_an_agent_that_is_switched_off_is_off_at_once_where_that_was_done(
    client: httpx.AsyncClient, stores: Stores, shop: Agent, dying: RedisServer, dead: Dead
) -> None:
    """The other pods learn of it from Redis, so the operator is told that they have not."""
    (session_id, *_) = await healthy_sessions(client, stores, shop, dying)
    path = f"/api/agents/{shop.name}"
    async with dead():
        problem(await client.patch(path, json={"active": False}, headers=ADMIN), 503, "redis_unavailable")
        refused = await post_message(client, session_id, agent=shop.name)
        assert refused.json()["code"] == "agent_inactive"
    repeated = await client.patch(path, json={"active": False}, headers=ADMIN)
    assert repeated.status_code == 200
    copy = await stores.agent_copies.find(shop.id)
    assert copy is not None
    assert not copy.definition.active


async def test_a_session_comes_back_from_postgres(
    client: httpx.AsyncClient,
    stores: Stores,
    shop: Agent,
    dying: RedisServer,
    dead: Dead,
    flush: Callable[[], Awaitable[None]],
) -> None:
    """It needs the agent's definition too, of its own accord."""
    sessions = await healthy_sessions(client, stores, shop, dying)
    await flush()
    for session_id in sessions:
        await stores.client.execute_command("DEL", stores.keys.session(session_id))
    async with dead():
        status, slowest_s = await visit(client, sessions, shop)
        assert status == {200}
        assert slowest_s < 2.0
        answer = await say(client, sessions[0], agent=shop.name)
        assert answer["metadata"]["history"] == 4
