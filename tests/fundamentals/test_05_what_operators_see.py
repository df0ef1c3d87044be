"""Operators see sessions wherever they are, and set up agents for all pods while these run. The admin key opens it all."""

from collections.abc import AsyncIterator

import httpx
import pytest

from gateway.app import Stores, build_pod
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.support.serving import ADMIN, served, wait_for
from tests.support.visiting import Flush, new_session_id, post_message, problem, say

WITHIN_S = 5
"""How soon a change of an agent is on every pod."""


@pytest.fixture
async def another_pod(settings: Settings, stores: Stores) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a second pod on the same Redis and Postgres."""
    own_stores = Stores(settings)
    async with served(await build_pod(settings, own_stores)) as client:
        yield client
    await own_stores.close()


async def test_the_list_shows_live_and_stored_sessions(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush
) -> None:
    await put_agent("shop")
    stored, live = new_session_id(), new_session_id()
    await say(client, stored)
    await flush()
    await stores.client.delete(stores.keys.session(stored))
    await say(client, live)

    listed = (await client.get("/api/sessions", headers=ADMIN)).json()
    assert [(one["session_id"], one["live"]) for one in listed["sessions"]] == [(live, True), (stored, False)]


async def test_the_statistics_count_every_session(client: httpx.AsyncClient, put_agent: PutAgent, flush: Flush) -> None:
    await put_agent("shop")
    await put_agent("bank")
    sessions = [new_session_id() for _ in range(3)]
    for session_id in sessions:
        await say(client, session_id)
    await flush()
    await say(client, sessions[0])
    await client.post(f"/api/sessions/{sessions[1]}/end")
    await say(client, new_session_id(), agent="bank")

    answer = await client.get("/api/sessions/stats", params={"agent_id": "shop"}, headers=ADMIN)
    statistics = answer.json()
    assert list(statistics)[:3] == ["total_sessions", "active_sessions", "avg_messages_per_session"]
    assert list(statistics.values())[:3] == [3, 2, 2.67]


async def test_an_agent_is_made_changed_and_deleted_over_http(client: httpx.AsyncClient, stores: Stores) -> None:
    made = await client.put("/api/agents/shop", json={"graph": "echo"}, headers=ADMIN)
    assert made.status_code == 201
    changed = await client.put("/api/agents/shop", json={"graph": "echo", "history_window": 4}, headers=ADMIN)
    assert changed.status_code == 200
    assert changed.json() == made.json() | {"history_window": 4}
    changed = await client.patch("/api/agents/shop", json={"retention_days": 30}, headers=ADMIN)
    assert changed.json() == made.json() | {"history_window": 4, "retention_days": 30}

    for reference in ("shop", made.json()["id"]):
        assert (await client.get(f"/api/agents/{reference}", headers=ADMIN)).json() == changed.json()
    assert (await client.get("/api/agents", headers=ADMIN)).json() == {"agents": [changed.json()]}

    assert (await client.delete("/api/agents/shop", headers=ADMIN)).status_code == 204
    problem(await client.get("/api/agents/shop", headers=ADMIN), 404, "agent_not_found")


async def test_a_change_of_an_agent_is_on_every_pod_within_seconds(
    client: httpx.AsyncClient, another_pod: httpx.AsyncClient
) -> None:
    async def another_pod_answers(status: int) -> bool:
        return (await post_message(another_pod, new_session_id())).status_code == status

    assert await another_pod_answers(404)
    await client.put("/api/agents/shop", json={"graph": "echo"}, headers=ADMIN)
    await wait_for(lambda: another_pod_answers(200), "the new agent answers", WITHIN_S)
    await client.put("/api/agents/shop", json={"graph": "echo", "active": False}, headers=ADMIN)
    await wait_for(lambda: another_pod_answers(403), "the agent is switched off", WITHIN_S)
    await client.delete("/api/agents/shop", headers=ADMIN)
    await wait_for(lambda: another_pod_answers(404), "the agent is gone", WITHIN_S)


async def test_without_the_admin_key_nothing_of_this_is_shown(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop")
    for method, path in (
        ("GET", "/api/sessions"),
        ("GET", "/api/sessions/stats"),
        ("GET", "/api/agents"),
        ("GET", "/api/agents/shop"),
        ("PUT", "/api/agents/shop"),
        ("PATCH", "/api/agents/shop"),
        ("DELETE", "/api/agents/shop"),
    ):
        for headers in ({}, {"Authorization": "Bearer another key, just as long"}, {"Authorization": "Basic YTpi"}):
            problem(await client.request(method, path, headers=headers), 401, "admin_key_required")
