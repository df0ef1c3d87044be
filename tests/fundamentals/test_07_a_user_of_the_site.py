"""A site that has users signs who its visitor is. The session is then that user's, and nobody else's."""

from time import time

import httpx
import jwt

from tests.conftest import PutAgent
from tests.support.visiting import Flush, Rows, problem

SITE_KEY = "the key that the shop signs with, 32 characters or more"
SESSION_ID = "session_1234567890_abc123xyz"


def signed(user: str) -> dict[str, str]:
    """What the site's server makes for a visitor who is logged in, as a page sends it."""
    return {"X-User-Token": jwt.encode({"sub": user, "exp": int(time()) + 900}, SITE_KEY, algorithm="HS256")}


async def test_who_logs_in_goes_on_in_the_same_session_and_keeps_it(
    client: httpx.AsyncClient, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent("shop", site_keys=(SITE_KEY,))
    body = {"message": "Hello", "session_id": SESSION_ID}
    assert (await client.post("/api/chat/shop/message", json=body)).status_code == 200
    answer = await client.post("/api/chat/shop/message", json=body, headers=signed("customer-7"))
    assert answer.json()["metadata"]["message_count"] == 4

    shown = await client.get(f"/api/sessions/{SESSION_ID}", headers=signed("customer-7"))
    assert shown.json()["user_id"] == "customer-7"
    for others in ({}, signed("customer-8")):
        problem(await client.get(f"/api/sessions/{SESSION_ID}", headers=others), 404, "session_not_found")
    await flush()
    assert [row[0] for row in await rows("SELECT external_user_id FROM agent_sessions")] == ["customer-7"]


async def test_an_agent_can_insist_on_known_users(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("members", site_keys=(SITE_KEY,), require_identity=True)
    body = {"message": "Hello", "session_id": SESSION_ID}
    problem(await client.post("/api/chat/members/message", json=body), 401, "identity_required")
    assert (await client.post("/api/chat/members/message", json=body, headers=signed("customer-7"))).status_code == 200


async def test_a_site_changes_its_key_without_logging_anybody_out(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop", site_keys=("the new key of the shop, which it signs with now", SITE_KEY))
    body = {"message": "Hello", "session_id": SESSION_ID}
    assert (await client.post("/api/chat/shop/message", json=body, headers=signed("customer-7"))).status_code == 200
