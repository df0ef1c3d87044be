"""What attackers want of other people's sessions."""

from typing import Any

import httpx
import pytest

from persistence.agents import Agent
from tests.attacks.conftest import BANK, SHOP, at
from tests.support.visiting import problem


@pytest.mark.parametrize("suffix", ["", "/messages", "/events"])
async def test_reading_another_sites_session_by_its_id(
    client: httpx.AsyncClient, bank: Agent, chosen: str, suffix: str
) -> None:
    path = f"/api/sessions/{chosen}{suffix}"
    problem(await client.get(path, headers=at(BANK)), 404, "session_not_found")
    async with client.stream("GET", path, headers=at(SHOP)) as honest:
        assert honest.status_code == 200


async def test_reading_a_minted_session_without_its_token(client: httpx.AsyncClient, minted: dict[str, Any]) -> None:
    path = f"/api/sessions/{minted['session_id']}"
    problem(await client.get(path, headers=at(SHOP)), 401, "session_token_required")
    honest = at(SHOP, Authorization=f"Bearer {minted['session_token']}")
    assert (await client.get(path, headers=honest)).status_code == 200
