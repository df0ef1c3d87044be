"""One shard of a Redis Cluster dies or hangs: the sessions on the others do not notice, wherever their agent's copy lies."""

import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from gateway.app import Stores
from gateway.definitions import FRESH_S, PATIENCE_S
from gateway.dev.servers.redis import RedisServer
from persistence.model.agents import Agent
from tests.shards.conftest import Dead, healthy_sessions
from tests.support.serving import ADMIN, wait_for
from tests.support.visiting import post_message, problem, say

SLOW_S = 1.0
"""What a turn of a healthy shard may take on a busy machine."""


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
