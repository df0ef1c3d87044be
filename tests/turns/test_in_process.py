"""The Python API."""

import httpx
import msgspec
import pytest

from gateway.app import Pod, Stores
from gateway.problems import AgentInactive, AgentNotFound, InvalidField
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.graphs.conftest import PROJECT, SESSION_ID, Flush, say


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With the graphs of the test project."""
    return msgspec.structs.replace(settings, graphs=str(PROJECT))


async def test_execute_text_answers_with_a_response_and_metadata(pod: Pod, put_agent: PutAgent) -> None:
    agent = await put_agent(graph="support")
    first = await pod.runtime.execute_text(agent.id, "One", SESSION_ID)
    assert set(first) == {"response", "metadata"}
    assert first["response"] == "answer 1: One"
    second = await pod.runtime.execute_text("shop", "Two", SESSION_ID, {"page": "/"})
    assert second["response"] == "answer 2: Two"
    assert second["metadata"]["given"] == {"page": "/"}
    assert second["metadata"]["message_count"] == 4


async def test_execute_text_and_the_http_api_share_a_session(
    pod: Pod, client: httpx.AsyncClient, put_agent: PutAgent
) -> None:
    await put_agent(graph="support")
    await say(client, "One", metadata={"website_domain": "Shop.Example."})
    answer = await pod.runtime.execute_text("shop", "Two", SESSION_ID, {"website_domain": "Shop.Example."})
    assert answer["response"] == "answer 2: Two"


async def test_execute_text_knows_no_agent_that_is_not_there(pod: Pod) -> None:
    with pytest.raises(AgentNotFound):
        await pod.runtime.execute_text("nobody", "One", SESSION_ID)


async def test_execute_text_refuses_an_agent_that_is_switched_off(pod: Pod, put_agent: PutAgent) -> None:
    await put_agent(active=False)
    with pytest.raises(AgentInactive):
        await pod.runtime.execute_text("shop", "One", SESSION_ID)


@pytest.mark.parametrize("session_id", ["", "short", "a session with spaces", "s" * 256, "session_of_a_line\nbreak"])
async def test_execute_text_refuses_what_is_no_session_id(
    pod: Pod, stores: Stores, put_agent: PutAgent, session_id: str
) -> None:
    await put_agent()
    with pytest.raises(InvalidField):
        await pod.runtime.execute_text("shop", "One", session_id)
    assert await stores.client.exists(stores.keys.session(session_id)) == 0


@pytest.mark.parametrize("odd", ["a\0b", "a\ud800b"], ids=["NUL", "lone surrogate"])
@pytest.mark.parametrize("where", ["message", "metadata"])
async def test_execute_text_lets_no_text_in_that_postgres_cannot_hold(
    pod: Pod, stores: Stores, put_agent: PutAgent, flush: Flush, odd: str, where: str
) -> None:
    await put_agent()
    message, metadata = (odd, {}) if where == "message" else ("One", {"page": odd})
    with pytest.raises(InvalidField):
        await pod.runtime.execute_text("shop", message, SESSION_ID, metadata)
    await flush()
    assert await stores.outbox.dead_letters() == []
