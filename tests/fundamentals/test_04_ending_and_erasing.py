"""Two ways out: an ended session is kept and takes no more messages, an erased one is nowhere any more."""

import json

import httpx
import pytest

from gateway.app import Stores
from tests.conftest import PutAgent
from tests.support.rule import all_keys
from tests.support.visiting import Flush, Rows, post_message, problem, say

SESSION_ID = "session_1234567890_abc123xyz"
WORDS = "the-words-of-the-visitor"


async def test_an_ended_session_takes_no_more_messages(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush
) -> None:
    await put_agent("shop")
    await say(client, SESSION_ID, WORDS)
    ended = await client.post(f"/api/sessions/{SESSION_ID}/end")
    assert (ended.status_code, ended.json()["status"]) == (200, "ended")
    problem(await post_message(client, SESSION_ID), 410, "session_ended")

    # Also when it comes back from Postgres.
    await flush()
    await stores.client.delete(stores.keys.session(SESSION_ID))
    problem(await post_message(client, SESSION_ID), 410, "session_ended")


async def test_ending_it_again_is_harmless(client: httpx.AsyncClient, put_agent: PutAgent, flush: Flush) -> None:
    await put_agent("shop")
    await say(client, SESSION_ID)
    first = await client.post(f"/api/sessions/{SESSION_ID}/end")
    await flush()
    second = await client.post(f"/api/sessions/{SESSION_ID}/end")
    assert second.status_code == 200
    assert second.json() == first.json()


async def test_the_conversation_of_an_ended_session_is_written_down_as_one(
    client: httpx.AsyncClient, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent("shop")
    await say(client, SESSION_ID, "Hello")
    await flush()
    assert [row[0] for row in await rows("SELECT conversation_history FROM agent_sessions")] == [None]

    await say(client, SESSION_ID, "Goodbye")
    await client.post(f"/api/sessions/{SESSION_ID}/end")
    await flush()
    ((status, ended_at, history),) = await rows("SELECT status, ended_at, conversation_history FROM agent_sessions")
    assert status == "ended"
    assert ended_at is not None
    assert [(one["role"], one["content"]) for one in json.loads(history)] == [
        ("user", "Hello"),
        ("assistant", "You said: Hello"),
        ("user", "Goodbye"),
        ("assistant", "You said: Goodbye"),
    ]


@pytest.mark.parametrize("flushed", ["while its records are queued", "after they reached Postgres"])
async def test_an_erased_session_is_nowhere(
    flushed: str, client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush, rows: Rows
) -> None:
    await put_agent("shop")
    await say(client, SESSION_ID, WORDS, metadata={"note": WORDS}, message_id="m1")
    assert WORDS in await everything_in_redis(stores)
    if flushed == "after they reached Postgres":
        await flush()

    assert (await client.delete(f"/api/sessions/{SESSION_ID}")).status_code == 204
    assert WORDS not in await everything_in_redis(stores)
    for _ in range(2):
        problem(await client.get(f"/api/sessions/{SESSION_ID}"), 404, "session_not_found")
        problem(await client.get(f"/api/sessions/{SESSION_ID}/messages"), 404, "session_not_found")
        problem(await client.post(f"/api/sessions/{SESSION_ID}/end"), 404, "session_not_found")
        await flush()
    for table in ("agent_sessions", "agent_messages"):
        assert await rows(f"SELECT * FROM {table}") == []
    assert await stores.client.xlen(stores.keys.outbox(0)) == 0
    assert not await stores.client.exists(stores.keys.session(SESSION_ID))


async def test_a_late_message_does_not_bring_an_erased_session_back(
    client: httpx.AsyncClient, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent("shop")
    opened = (await client.post("/api/sessions", json={"agent_id": "shop"})).json()
    headers = {"Authorization": f"Bearer {opened['session_token']}"}
    body = {"message": WORDS, "session_id": opened["session_id"], "message_id": "m1"}
    assert (await client.post("/api/chat/shop/message", json=body, headers=headers)).status_code == 200
    assert (await client.delete(f"/api/sessions/{opened['session_id']}", headers=headers)).status_code == 204
    await flush()
    problem(await client.post("/api/chat/shop/message", json=body, headers=headers), 404, "session_not_found")
    await flush()
    assert await rows("SELECT * FROM agent_sessions") == []


async def everything_in_redis(stores: Stores) -> str:
    """All values of all keys, as one text."""
    found: list[object] = []
    for key in await all_keys(stores.client, stores.keys):
        match await stores.client.type(key):
            case b"hash":
                found.append(await stores.client.hgetall(key))
            case b"stream":
                found.append(await stores.client.xrange(key))
            case b"zset":
                found.append(await stores.client.zrange(key, 0, -1))
            case _:
                found.append(await stores.client.get(key))
    return repr(found)
