"""The first thing to know: one message, one answer, and where they are kept."""

from collections.abc import Awaitable, Callable
from typing import Any

import httpx

from gateway.app import Stores
from tests.conftest import PutAgent

SESSION_ID = "session_1234567890_abc123xyz"
BODY = {
    "message": "Hello",
    "session_id": SESSION_ID,
    "metadata": {
        "website_domain": "shop.example",
        "user_agent": "Mozilla/5.0",
        "timestamp": "2026-01-01T00:00:00.000Z",
    },
}


async def test_a_message_gets_an_answer(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop")
    answer = await client.post("/api/chat/shop/message", json=BODY)
    assert answer.status_code == 200
    assert answer.json()["response"] == "You said: Hello"
    assert answer.json()["metadata"] | {"turn_id": "", "latency_ms": 0} == {
        "history": 0,
        "session_id": SESSION_ID,
        "turn_id": "",
        "message_count": 2,
        "latency_ms": 0,
        "replayed": False,
    }


async def test_the_second_message_sees_the_first(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop")
    await client.post("/api/chat/shop/message", json=BODY)
    answer = await client.post("/api/chat/shop/message", json=BODY | {"message": "And again"})
    assert answer.json()["metadata"]["history"] == 2
    assert answer.json()["metadata"]["message_count"] == 4


async def test_until_postgres_has_it_the_session_has_no_ttl(
    client: httpx.AsyncClient,
    put_agent: PutAgent,
    stores: Stores,
    flush: Callable[[], Awaitable[None]],
    rows: Callable[..., Awaitable[list[Any]]],
) -> None:
    await put_agent("shop")
    await client.post("/api/chat/shop/message", json=BODY)
    key = stores.keys.session(SESSION_ID)
    assert await stores.client.ttl(key) == -1
    assert await rows("SELECT * FROM agent_messages") == []

    await flush()

    assert 0 < await stores.client.ttl(key) <= 1800
    found = await rows("SELECT role, content FROM agent_messages ORDER BY seq")
    assert [tuple(row) for row in found] == [("user", "Hello"), ("assistant", "You said: Hello")]
