"""A pod with real HTTP and two websites, each with an agent of its own: what attackers on one of them try on the other."""

from typing import Any

import httpx
import pytest

from persistence.model.agents import Agent
from tests.conftest import PutAgent
from tests.support.visiting import new_session_id, say

SHOP, BANK, EVIL = "shop.example", "bank.example", "evil.example"


def at(domain: str, **headers: str) -> dict[str, str]:
    """The headers of a browser on a website, and others: `at(SHOP, Authorization="Bearer …")`."""
    return {"Origin": f"https://{domain}", **headers}


@pytest.fixture
async def shop(put_agent: PutAgent) -> Agent:
    """The agent `shop`, for shop.example alone."""
    return await put_agent("shop", allowed_domains=(SHOP,))


@pytest.fixture
async def bank(put_agent: PutAgent) -> Agent:
    """The agent `bank`, for bank.example alone."""
    return await put_agent("bank", allowed_domains=(BANK,))


@pytest.fixture
async def anywhere(put_agent: PutAgent) -> Agent:
    """The agent `anywhere`, which any website may use."""
    return await put_agent("anywhere")


@pytest.fixture
async def chosen(client: httpx.AsyncClient, shop: Agent) -> str:
    """A session of a visitor of the shop under an id that the browser made up, with one turn: `my secret`."""
    session_id = new_session_id()
    await say(client, session_id, "my secret", headers=at(SHOP))
    return session_id


@pytest.fixture
async def minted(client: httpx.AsyncClient, shop: Agent) -> dict[str, Any]:
    """A session of a visitor of the shop that the gateway minted: the answer to `POST /api/sessions`."""
    opened = await client.post("/api/sessions", json={"agent_id": "shop"}, headers=at(SHOP))
    assert opened.status_code == 201, opened.text
    session: dict[str, Any] = opened.json()
    return session
