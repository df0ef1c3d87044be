"""Redis comes back without its last writes, which Postgres has: what it has forgotten holds all the same."""

from collections.abc import Iterator
from pathlib import Path
from time import time
from typing import Any

import httpx
import jwt
import pytest
from redis.asyncio import Redis

from gateway.app import Stores
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from tests.conftest import put_in, settings_for
from tests.support.rule import breaches
from tests.support.visiting import Flush, Rows

SITE_KEY = "the key that the shop signs with, 32 characters or more"
CUSTOMER = {"X-User-Token": jwt.encode({"sub": "customer-7", "exp": int(time()) + 900}, SITE_KEY, algorithm="HS256")}


class Snapshots:
    """A Redis that writes no append-only file, and goes back to its last dump when it is killed."""

    def __init__(self, server: RedisServer) -> None:
        self.server = server

    async def save(self) -> None:
        async with Redis(port=self.server.port) as client:
            await client.save()

    def roll_back(self) -> None:
        self.server.kill()
        self.server.start()


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[Snapshots]:
    with RedisServer(tmp_path / "redis", free_port(), config={"appendonly": "no"}) as server:
        yield Snapshots(server)


@pytest.fixture
def settings(redis: Snapshots, postgres_server: PostgresServer) -> Settings:
    return settings_for(redis.server.url, postgres_server.url)


async def say(client: httpx.AsyncClient, session_id: str, text: str, **headers: str) -> httpx.Response:
    body = {"message": text, "session_id": session_id, "metadata": {"website_domain": "shop.example"}}
    return await client.post("/api/chat/shop/message", json=body, headers=headers)


async def answered(client: httpx.AsyncClient, session_id: str, text: str, **headers: str) -> dict[str, Any]:
    answer = await say(client, session_id, text, **headers)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def identifier(name: str) -> str:
    return f"session_1700000000000_{name}"


async def stored(rows: Rows, name: str) -> list[tuple[int, int, str]]:
    """The visitor's messages as Postgres has them: turn, number, text."""
    found = await rows(
        "SELECT turn, seq, content FROM agent_messages m JOIN agent_sessions s ON s.id = m.session_id "
        "WHERE s.session_id = $1 AND role = 'user' ORDER BY seq",
        identifier(name),
    )
    return [tuple(row) for row in found]


async def is_hidden(client: httpx.AsyncClient, name: str) -> bool:
    """Whether a stranger is told that there is no such session."""
    answer = await client.get(f"/api/sessions/{identifier(name)}/messages")
    return answer.status_code == 404


async def test_what_redis_forgot_holds(
    redis: Snapshots, stores: Stores, client: httpx.AsyncClient, flush: Flush, rows: Rows
) -> None:
    await put_in(stores)("shop", site_keys=(SITE_KEY,))
    for name in ("talks", "ended", "erased", "bound"):
        await answered(client, identifier(name), "first")
    await flush()
    await redis.save()

    for number in range(3):
        await answered(client, identifier("talks"), f"forgotten {number}")
    await answered(client, identifier("new"), "forgotten altogether")
    assert (await client.post(f"/api/sessions/{identifier('ended')}/end")).status_code == 200
    assert (await client.delete(f"/api/sessions/{identifier('erased')}")).status_code == 204
    await answered(client, identifier("bound"), "mine now", **CUSTOMER)
    await flush()
    redis.roll_back()

    history = (await answered(client, identifier("talks"), "second"))["metadata"]["history"]
    assert history == 8, "the graph is given what Redis had forgotten"
    assert (await answered(client, identifier("new"), "second"))["metadata"]["history"] == 2
    assert (await say(client, identifier("ended"), "again")).json()["code"] == "session_ended"
    assert (await say(client, identifier("erased"), "again")).json()["code"] == "session_erased"
    assert await is_hidden(client, "bound")
    assert (await answered(client, identifier("bound"), "second", **CUSTOMER))["metadata"]["history"] == 4
    await flush()
    assert await stored(rows, "talks") == [
        (1, 1, "first"),
        (2, 3, "forgotten 0"),
        (3, 5, "forgotten 1"),
        (4, 7, "forgotten 2"),
        (5, 9, "second"),
    ]
    assert await stored(rows, "new") == [(1, 1, "forgotten altogether"), (2, 3, "second")]
    assert await stored(rows, "erased") == []
    (row,) = await rows("SELECT status FROM agent_sessions WHERE session_id = $1", identifier("ended"))
    assert row["status"] == "ended"
    assert await stored(rows, "bound") == [(1, 1, "first"), (2, 3, "mine now"), (3, 5, "second")]
    assert await stores.client.delete(stores.keys.session(identifier("bound"))), "its TTL is over"
    assert await is_hidden(client, "bound")
    assert await stores.outbox.dead_letters() == []
    assert not await breaches(stores.client, stores.keys)
