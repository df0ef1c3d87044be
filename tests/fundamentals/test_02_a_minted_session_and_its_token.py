"""A session can be opened before its first message. Its id is then the gateway's, and needs its token."""

import httpx

from tests.conftest import PutAgent
from tests.support.visiting import problem


async def test_opening_a_session_mints_an_id_and_a_token(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    agent = await put_agent("shop")
    opened = await client.post("/api/sessions", json={"agent_id": "shop"})
    assert opened.status_code == 201
    session = opened.json()
    assert list(session) == ["session_id", "session_token", "agent_id", "channel", "status", "started_at"]
    assert (session["agent_id"], session["channel"], session["status"]) == (agent.id, "text", "active")


async def test_with_its_token_the_session_answers(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop")
    session = (await client.post("/api/sessions", json={"agent_id": "shop"})).json()
    token = {"Authorization": f"Bearer {session['session_token']}"}
    body = {"message": "Hello", "session_id": session["session_id"]}

    answer = await client.post("/api/chat/shop/message", json=body, headers=token)
    assert answer.json()["response"] == "You said: Hello"

    shown = await client.get(f"/api/sessions/{session['session_id']}", headers=token)
    assert shown.json()["message_count"] == 2


async def test_without_its_token_nothing_can_be_done_with_it(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop")
    session_id = (await client.post("/api/sessions", json={"agent_id": "shop"})).json()["session_id"]
    body = {"message": "Hello", "session_id": session_id}
    for answer in (
        await client.post("/api/chat/shop/message", json=body),
        await client.get(f"/api/sessions/{session_id}"),
        await client.get(f"/api/sessions/{session_id}/messages"),
        await client.post(f"/api/sessions/{session_id}/end"),
        await client.delete(f"/api/sessions/{session_id}"),
        await client.post("/api/sessions", json={"agent_id": "shop", "session_id": session_id}),
    ):
        problem(answer, 401, "session_token_required")


async def test_an_id_that_the_browser_made_up_needs_no_token(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop")
    body = {"message": "Hello", "session_id": "session_1234567890_abc123xyz"}
    assert (await client.post("/api/chat/shop/message", json=body)).status_code == 200
    shown = await client.get("/api/sessions/session_1234567890_abc123xyz")
    assert shown.json()["message_count"] == 2


async def test_an_agent_can_insist_on_minted_ids(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("bank", require_token=True)
    body = {"message": "Hello", "session_id": "session_1234567890_abc123xyz"}
    problem(await client.post("/api/chat/bank/message", json=body), 404, "session_not_found")

    session = (await client.post("/api/sessions", json={"agent_id": "bank"})).json()
    answer = await client.post(
        "/api/chat/bank/message",
        json=body | {"session_id": session["session_id"]},
        headers={"Authorization": f"Bearer {session['session_token']}"},
    )
    assert answer.status_code == 200
