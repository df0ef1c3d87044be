"""Pods whose graph waits for the test, and what tests of turns ask of them."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from gateway.app import Stores
from gateway.settings import Settings
from tests.support.pods import ServedPod, fields_of, gated_pod, plain_logs
from tests.support.serving import wait_for

SESSION_ID = "session_1234567890_abc123xyz"
Rows = Callable[..., Awaitable[list[Any]]]
Flush = Callable[[], Awaitable[None]]
StartPod = Callable[..., Awaitable[ServedPod]]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with plain_logs():
        yield


@pytest.fixture
async def start_pod(settings: Settings, stores: Stores) -> AsyncIterator[StartPod]:
    """Starts another pod on the same stores: `await start_pod(lease_s=1)`."""
    async with AsyncExitStack() as stack:

        async def start(**changes: Any) -> ServedPod:
            return await stack.enter_async_context(gated_pod(settings, **changes))

        yield start


@pytest.fixture
async def pod_a(start_pod: StartPod) -> ServedPod:
    return await start_pod()


@pytest.fixture
async def pod_b(start_pod: StartPod) -> ServedPod:
    return await start_pod()


async def stored(rows: Rows) -> list[str]:
    """The contents of all messages in Postgres, in order."""
    return [row[0] for row in await rows("SELECT content FROM agent_messages ORDER BY session_id, seq")]


def outcome(response: httpx.Response) -> tuple[int, str]:
    """The status, and the answer or the error's code."""
    body = response.json()
    return response.status_code, body.get("response") or body["code"]


async def waiting(stores: Stores, count: int) -> None:
    """Waits until so many messages wait for the session."""

    async def so_many() -> bool:
        return len((await fields_of(stores, SESSION_ID))["waiting"].split()) == count

    await wait_for(so_many, f"{count} messages wait")
