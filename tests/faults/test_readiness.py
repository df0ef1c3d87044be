"""`/readyz` says whether a turn is possible, which a server that answers PING may not allow."""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import pytest
from redis.asyncio import Redis

from gateway.app import Stores
from gateway.dev.servers.ports import HOST, free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from persistence.redis.probe import Probe
from tests.conftest import settings_for
from tests.support.serving import wait_for

Harm = Callable[[Redis], Awaitable[Any]]


async def channels(redis: Redis, rule: str) -> None:
    """Changes the right to publish, and no other."""
    await redis.execute_command("ACL", "SETUSER", "default", rule)  # type: ignore[no-untyped-call]


HARMS: dict[str, tuple[Harm, Harm]] = {
    "NOREPLICAS": (
        lambda redis: redis.config_set("min-replicas-to-write", 1),
        lambda redis: redis.config_set("min-replicas-to-write", 0),
    ),
    "READONLY": (lambda redis: redis.replicaof(HOST, 1), lambda redis: redis.replicaof("NO", "ONE")),
    "OOM": (lambda redis: redis.config_set("maxmemory", 1), lambda redis: redis.config_set("maxmemory", 0)),
    "NOPERM": (
        lambda redis: channels(redis, "resetchannels"),
        lambda redis: channels(redis, "allchannels"),
    ),
}


@pytest.fixture(scope="module")
def redis(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis"), free_port(), config={"maxmemory-policy": "noeviction"}) as server:
        yield server


@pytest.fixture
def settings(redis: RedisServer, postgres_server: PostgresServer) -> Settings:
    return settings_for(redis.url, postgres_server.url)


@pytest.mark.parametrize("reason", HARMS)
async def test_a_redis_that_takes_no_turn_makes_the_pod_not_ready(
    redis: RedisServer, client: httpx.AsyncClient, reason: str
) -> None:
    harm, mend = HARMS[reason]

    async def readiness() -> tuple[int, str, str | None]:
        answer = await client.get("/readyz")
        return answer.status_code, answer.json()["redis"], answer.json().get("reason")

    assert await readiness() == (200, "ok", None)
    async with Redis(port=redis.port) as operator:
        await harm(operator)
        try:

            async def is_told() -> bool:
                return await readiness() == (503, "down", reason)

            await wait_for(is_told, "the pod says that it is not ready, and why")
        finally:
            await mend(operator)

    async def is_ready() -> bool:
        return await readiness() == (200, "ok", None)

    await wait_for(is_ready, "the pod is ready again")


async def test_control_a_server_that_answers_looks_ready(
    redis: RedisServer, stores: Stores, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def ping(probe: Probe, partition: int) -> None:
        await stores.client.ping()

    monkeypatch.setattr(Probe, "_try", ping)
    harm, mend = HARMS["NOREPLICAS"]
    async with Redis(port=redis.port) as operator:
        await harm(operator)
        try:
            assert (await client.get("/readyz")).status_code == 200
        finally:
            await mend(operator)


async def test_a_balancer_may_ask_as_often_as_it_likes(
    stores: Stores, client: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries = 0
    run = type(stores.scripts).run

    async def counted(scripts: Any, name: str, *arguments: Any, **named: Any) -> Any:
        nonlocal tries
        tries += name == "try_write"
        return await run(scripts, name, *arguments, **named)

    monkeypatch.setattr(type(stores.scripts), "run", counted)
    monkeypatch.setattr("persistence.redis.probe.FRESH_S", 60.0)
    for _ in range(10):
        assert (await client.get("/readyz")).status_code == 200
    assert tries == 1
