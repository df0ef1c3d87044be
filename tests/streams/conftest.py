"""Two pods whose turns stream what the test says."""

from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest
import structlog

from gateway.app import Stores
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.streams.steps import Pods
from tests.support.spoken import Spoken, new_session_id, spoken_pod


@pytest.fixture(autouse=True)
def short_logs() -> Iterator[None]:
    """Without tracebacks as they are drawn on terminals, which take a second each."""
    structlog.configure(processors=[structlog.processors.KeyValueRenderer()])
    yield
    structlog.reset_defaults()


@pytest.fixture
def spoken() -> Spoken:
    return Spoken()


@pytest.fixture
async def pods(settings: Settings, stores: Stores, spoken: Spoken, put_agent: PutAgent) -> AsyncIterator[Pods]:
    """Two pods, and the agent `shop` whose turns stream what the test says."""
    await put_agent("shop", graph="spoken")
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(spoken_pod(settings, spoken)) for _ in range(2)]
        yield one, other


@pytest.fixture
def session_id() -> str:
    return new_session_id()
