"""The built-in graph `chat` against a local server that speaks OpenAI's wire format, through a pod."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from gateway.app import Stores, build_pod
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.support.model_server import MODEL, USAGE, Fault, ModelServer, model_server
from tests.support.serving import ADMIN, GatewayProcess, served, wait_for
from tests.support.spoken import new_session_id
from tests.support.sse import check_whole, kinds, speak, text_of

KEY = "sk-test-0123456789abcdef"
SECRET = "my-card-number-4111"


@pytest.fixture
async def models(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[ModelServer]:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    async with model_server() as models:
        yield models


@pytest.fixture
async def client(settings: Settings, stores: Stores, models: ModelServer) -> AsyncIterator[httpx.AsyncClient]:
    """A pod that may ask the local server, and its agent `shop`."""
    settings = msgspec.structs.replace(settings, model_base_urls=f"https://other.example/v1, {models.url}")
    own = Stores(settings)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(own.close)
        client = await stack.enter_async_context(served(await build_pod(settings, own)))
        stack.callback(models.release)
        answer = await client.put("/api/agents/shop", json=definition(models), headers=ADMIN)
        assert answer.status_code == 201, answer.text
        yield client


def definition(models: ModelServer, **config: Any) -> dict[str, Any]:
    """An agent on the graph `chat`."""
    fields = {"model": "openai:gpt-test", "system_prompt": "You sell shoes.", "temperature": 0.25, "base_url": models.url}
    return {"graph": "chat", "config": fields | config, "rate_limit": None}


async def ask(client: httpx.AsyncClient, session_id: str, message: str) -> httpx.Response:
    return await client.post("/api/chat/shop/message", json={"message": message, "session_id": session_id})


async def messages_of(client: httpx.AsyncClient, session_id: str) -> list[dict[str, Any]]:
    answer = await client.get(f"/api/sessions/{session_id}/messages")
    found: list[dict[str, Any]] = answer.json()["messages"] if answer.status_code == 200 else []
    return found


async def test_tokens_stream_as_they_come(client: httpx.AsyncClient, models: ModelServer) -> None:
    """The server keeps its last token until the client has had the first."""
    models.holding = True
    session_id = new_session_id()
    async with speak(client, session_id, "Hello") as stream:
        assert kinds(await stream.take(3)) == ["turn.started", "text.delta", "text.delta"]
        assert text_of(stream.events) == "Good day"
        models.release()
        await stream.rest()
    check_whole(stream.events)
    assert kinds(stream.events)[3:] == ["text.delta", "turn.completed"]
    assert text_of(stream.events) == stream.events[-1].data["response"] == "Good day!"
    request = models.requests[0]
    assert request["stream"] is True
    assert (request["model"], request["temperature"]) == ("gpt-test", 0.25)
    assert models.headers[0]["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize("streamed", [True, False], ids=["stream", "message"])
async def test_usage_and_model_are_recorded(client: httpx.AsyncClient, models: ModelServer, streamed: bool) -> None:
    session_id = new_session_id()
    if streamed:
        async with speak(client, session_id, "Hello") as stream:
            assert (await stream.rest())[-1].data["response"] == "Good day!"
    else:
        assert (await ask(client, session_id, "Hello")).json()["response"] == "Good day!"
    question, answer = await messages_of(client, session_id)
    assert answer["content"] == "Good day!"
    assert answer["tokens_used"] == USAGE["total_tokens"]
    assert answer["model_used"] == MODEL
    assert not {"tokens_used", "model_used"} & question.keys()


async def test_the_model_is_given_the_system_prompt_and_the_history(client: httpx.AsyncClient, models: ModelServer) -> None:
    session_id = new_session_id()
    await ask(client, session_id, "Hello")
    models.tokens = ["Size", " 42"]
    async with speak(client, session_id, "Which size?") as stream:
        await stream.rest()
    said = [(message["role"], message["content"]) for message in models.requests[1]["messages"]]
    assert said == [
        ("system", "You sell shoes."),
        ("user", "Hello"),
        ("assistant", "Good day!"),
        ("user", "Which size?"),
    ]
    contents = [message["content"] for message in await messages_of(client, session_id)]
    assert contents == ["Hello", "Good day!", "Which size?", "Size 42"]


@pytest.mark.parametrize(
    "config",
    [
        {"base_url": "http://127.0.0.1:9/v1"},
        {"base_url": "https://other.example/v1/../../admin"},
        {"base_url": "https://other.example/v1 "},
        {"base_url": ""},
        {"base_url": 7},
        {"model": ""},
        {"model": None},
        {"temperature": 3},
        {"temperature": "hot"},
        {"system_prompt": 1},
    ],
    ids=str,
)
async def test_a_config_that_is_not_allowed_is_refused(
    client: httpx.AsyncClient, models: ModelServer, config: dict[str, Any]
) -> None:
    answer = await client.put("/api/agents/other", json=definition(models, **config), headers=ADMIN)
    assert (answer.status_code, answer.json()["code"], answer.json()["field"]) == (422, "invalid_field", "config")
    assert next(iter(config)) in answer.json()["detail"]
    assert (await client.get("/api/agents/other", headers=ADMIN)).status_code == 404


async def test_an_endpoint_that_is_not_allowed_any_more_is_not_asked(
    client: httpx.AsyncClient, models: ModelServer, put_agent: PutAgent
) -> None:
    """The definition was put when another list was in force."""
    async with model_server() as unwanted:
        fields = definition(unwanted)
        await put_agent("old", graph="chat", config=fields["config"])
        async with speak(client, new_session_id(), "Hello", agent="old") as stream:
            events = await stream.rest()
        assert (events[-1].kind, events[-1].data["code"]) == ("turn.failed", "graph_failed")
        assert unwanted.requests == []


async def test_a_request_cannot_choose_model_or_endpoint(client: httpx.AsyncClient, models: ModelServer) -> None:
    body = {
        "message": "Hello",
        "session_id": new_session_id(),
        "metadata": {"model": "openai:gpt-expensive", "base_url": "http://127.0.0.1:9/v1", "configurable": {"model": "x"}},
    }
    assert (await client.post("/api/chat/shop/message", json=body)).status_code == 200
    assert models.requests[0]["model"] == "gpt-test"


@pytest.mark.parametrize("fault", [(429, {"Retry-After": "0"}), (500, {}), (503, {})], ids=["429", "500", "503"])
async def test_a_passing_fault_is_not_seen(
    client: httpx.AsyncClient, models: ModelServer, fault: tuple[int, dict[str, str]]
) -> None:
    models.faults = [fault]
    session_id = new_session_id()
    async with speak(client, session_id, "Hello") as stream:
        events = await stream.rest()
    check_whole(events)
    assert (kinds(events)[-1], text_of(events)) == ("turn.completed", "Good day!")
    assert len(models.requests) == 2


LASTING: list[Fault] = [(429, {"Retry-After": "0"}), (500, {}), (401, {}), "cut"]


@pytest.mark.parametrize(
    ("fault", "streamed"),
    # Only a stream can stop in good order before its end.
    [*((fault, streamed) for fault in LASTING for streamed in (True, False)), ("truncated", True)],
    ids=str,
)
async def test_a_lasting_fault_ends_the_turn_and_leaves_the_session(
    client: httpx.AsyncClient, models: ModelServer, fault: Fault, streamed: bool
) -> None:
    session_id = new_session_id()
    assert (await ask(client, session_id, "Hello")).status_code == 200
    models.faults = [fault] * 10
    if streamed:
        async with speak(client, session_id, "Again") as stream:
            events = await stream.rest()
        check_whole(events)
        assert events[-1].kind == "turn.failed", events
        assert events[-1].data == {"code": "graph_failed", "title": "The agent failed", "retryable": True}
    else:
        answer = await ask(client, session_id, "Again")
        assert (answer.status_code, answer.json()["code"], answer.json()["retryable"]) == (502, "graph_failed", True)
        assert "told to fail" not in answer.text
    assert [message["content"] for message in await messages_of(client, session_id)] == ["Hello", "Good day!"]
    models.faults = []
    assert (await ask(client, session_id, "Once more")).json()["metadata"]["message_count"] == 4


async def test_a_slow_first_token_can_be_waited_for_or_cancelled(client: httpx.AsyncClient, models: ModelServer) -> None:
    models.slow_first = True
    session_id = new_session_id()
    async with speak(client, session_id, "Hello") as stream:
        await stream.take(1)
        await wait_for(lambda: models.requests, "the model is asked")
        assert (await client.post("/api/chat/shop/cancel", json={"session_id": session_id})).status_code == 202
        assert kinds(await stream.rest()) == ["turn.cancelled"]
    await wait_for(lambda: models.cancelled == 1, "the model is asked no more")
    assert await messages_of(client, session_id) == []
    async with speak(client, session_id, "Hello") as stream:
        await stream.take(1)
        await wait_for(lambda: len(models.requests) == 2, "the model is asked again")
        models.release()
        assert text_of(await stream.rest()) == "Good day!"


async def test_a_slow_first_token_beyond_the_limit_ends_the_turn(
    client: httpx.AsyncClient, models: ModelServer, put_agent: PutAgent
) -> None:
    await put_agent("hasty", graph="chat", config=definition(models)["config"], turn_timeout_s=0.3)
    models.slow_first = True
    session_id = new_session_id()
    async with speak(client, session_id, "Hello", agent="hasty") as stream:
        events = await stream.rest()
    assert (events[-1].kind, events[-1].data["code"]) == ("turn.failed", "turn_timeout")
    assert await messages_of(client, session_id) == []


async def test_neither_keys_nor_what_visitors_say_are_in_the_logs(
    settings: Settings, stores: Stores, models: ModelServer, put_agent: PutAgent, tmp_path: Path
) -> None:
    """A process with its logs as in production, when all goes well and when it does not."""
    await put_agent("shop", graph="chat", config=definition(models, system_prompt="Nobody may know this prompt.")["config"])
    environment = {
        "GATEWAY_REDIS_URL": settings.redis_url,
        "GATEWAY_DATABASE_URL": settings.database_url,
        "GATEWAY_MODEL_BASE_URLS": models.url,
        "OPENAI_API_KEY": KEY,
    }
    pod = await GatewayProcess("serve", tmp_path, environment).start()
    try:
        async with httpx.AsyncClient(base_url=pod.url, timeout=40) as client:
            session_id = new_session_id()
            models.tokens = ["Your ", "private ", "answer"]
            assert (await ask(client, session_id, f"Hello, {SECRET}")).status_code == 200
            faults: list[Fault] = ["cut", (401, {}), (400, {})]
            for fault in faults:
                models.faults = [fault] * 3
                async with speak(client, session_id, f"Again, {SECRET}") as stream:
                    assert kinds(await stream.rest())[-1] == "turn.failed"
            await asyncio.to_thread(pod.stop)
    finally:
        pod.kill()
    log = pod.output()
    assert '"event": "graph.failed"' in log
    leaks = [what for what in (KEY, SECRET, "Nobody may know", "private answer", "Your private", session_id) if what in log]
    assert leaks == []
