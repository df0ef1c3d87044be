"""A pod on the graphs of the test project, and what tests of graphs ask of it."""

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import httpx
import msgspec
import pytest

from gateway.app import Pod, Stores
from gateway.graphs.contract import GraphInput
from gateway.graphs.graphs import Graphs
from gateway.graphs.loading import load_graphs
from gateway.settings import Settings
from persistence.model.agents import Agent, AgentDefinition
from tests.support.pods import plain_logs
from tests.support.serving import ROOT

PROJECT = ROOT / "tests" / "data" / "project" / "langgraph.json"
SESSION_ID = "session_1234567890_abc123xyz"
Rows = Callable[..., Awaitable[list[Any]]]
Flush = Callable[[], Awaitable[None]]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with plain_logs():
        yield


@pytest.fixture(scope="module")
async def graphs() -> Graphs:
    """The graphs of the test project, loaded once as a pod does."""
    return await load_graphs(PROJECT)


@pytest.fixture
async def pod(settings: Settings, stores: Stores, graphs: Graphs) -> Pod:
    """A pod with these graphs that is not served."""
    return Pod(settings, stores, graphs)


def agent_on(graph: str, **config: Any) -> Agent:
    return Agent("01980000-0000-7000-8000-000000000000", "shop", AgentDefinition(graph=graph, config=config))


def given(message: str = "Hello", **fields: Any) -> GraphInput:
    """What a graph is given in a session's first turn."""
    return msgspec.structs.replace(
        GraphInput(
            history=[],
            user_input=message,
            message_uuid="01980000-0000-7000-8000-000000000001",
            context={},
            metadata={},
            session_id=SESSION_ID,
            channel="text",
        ),
        **fields,
    )


async def say(client: httpx.AsyncClient, message: str, **fields: Any) -> httpx.Response:
    body = {"message": message, "session_id": SESSION_ID, **fields}
    return await client.post("/api/chat/shop/message", json=body)


async def messages_of(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """The session's transcript."""
    answer = await client.get(f"/api/sessions/{SESSION_ID}/messages")
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["messages"]
    return found
