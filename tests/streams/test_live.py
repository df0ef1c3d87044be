"""Streamed turns as they happen: their events, their failures, clients that vanish."""

import asyncio
import random
from typing import Any

import httpx
import pytest

from gateway.app import Stores
from tests.conftest import PutAgent
from tests.streams.steps import SHOP, Pods, problem, rest_of, spoken_turn
from tests.support.serving import wait_for
from tests.support.spoken import Spoken, new_session_id
from tests.support.sse import check_whole, kinds, resume, speak, text_of


async def test_a_turn_streams_its_start_its_text_and_its_end(pods: Pods, spoken: Spoken, session_id: str) -> None:
    pod = pods[0]
    spoken.say("Hello", "Good ", "day, ", "visitor\n")
    spoken.end("Hello")
    async with speak(pod.client, session_id, "Hello") as stream:
        events = await rest_of(stream)
        headers = stream.response.headers
    assert headers["content-type"].split(";")[0] == "text/event-stream"
    assert (headers["x-accel-buffering"], headers["cache-control"]) == ("no", "no-store")
    assert "content-length" not in headers
    assert "content-encoding" not in headers
    check_whole(events)
    assert kinds(events) == ["turn.started", "text.delta", "text.delta", "text.delta", "turn.completed"]
    assert text_of(events) == "Good day, visitor\n"
    turn_id = events[0].data["turn_id"]
    assert events[0].data == {"turn_id": turn_id, "session_id": session_id, "message": "Hello"}
    completed = events[-1].data
    assert completed["response"] == "Good day, visitor\n"
    assert completed["metadata"] | {"latency_ms": 0} == {
        "history": 0,
        "session_id": session_id,
        "turn_id": turn_id,
        "message_count": 2,
        "latency_ms": 0,
        "replayed": False,
    }
    messages = (await pod.client.get(f"/api/sessions/{session_id}/messages")).json()["messages"]
    assert [(message["role"], message["content"], message["turn_id"]) for message in messages] == [
        ("user", "Hello", turn_id),
        ("assistant", "Good day, visitor\n", turn_id),
    ]
    assert messages[1]["latency_ms"] == completed["metadata"]["latency_ms"]


async def test_events_come_while_the_graph_still_runs(pods: Pods, spoken: Spoken, session_id: str) -> None:
    async with speak(pods[0].client, session_id, "Hello") as stream:
        assert (await stream.next()).kind == "turn.started"
        for piece in ("one ", "two "):
            spoken.say("Hello", piece)
            assert (await stream.next()).data == {"text": piece}
        spoken.say("Hello", {"step": "search", "found": [1, None, "é"]})
        assert (await stream.next())[1:] == ("custom", {"step": "search", "found": [1, None, "é"]})
        spoken.end("Hello")
        assert kinds(await rest_of(stream)) == ["turn.completed"]


async def test_a_graph_that_does_not_stream_gives_one_delta(pods: Pods, put_agent: PutAgent, session_id: str) -> None:
    await put_agent("quiet")
    async with speak(pods[0].client, session_id, "Hello", agent="quiet") as stream:
        events = await rest_of(stream)
    check_whole(events)
    assert kinds(events) == ["turn.started", "text.delta", "turn.completed"]
    assert text_of(events) == events[-1].data["response"] == "You said: Hello"


async def test_a_graph_that_fails_ends_the_stream_and_leaves_the_session(
    pods: Pods, spoken: Spoken, session_id: str, caplog: pytest.LogCaptureFixture
) -> None:
    await spoken_turn(pods[0], spoken, session_id, "Hello", "Hi")
    spoken.say("Again", "half an ", RuntimeError("no more"))
    async with speak(pods[0].client, session_id, "Again") as stream:
        events = await rest_of(stream)
    check_whole(events)
    assert kinds(events) == ["turn.started", "text.delta", "turn.failed"]
    assert events[-1].data == {"code": "graph_failed", "title": "The agent failed", "retryable": True}
    assert await pods[1].transcript(session_id) == ["Hello", "Hi"]
    for pod in pods:
        async with resume(pod.client, session_id, events[0].data["turn_id"]) as stream:
            assert await rest_of(stream) == events


async def test_a_turn_that_takes_too_long_ends_its_stream(
    pods: Pods, put_agent: PutAgent, spoken: Spoken, session_id: str
) -> None:
    await put_agent("hasty", graph="spoken", turn_timeout_s=0.2)
    spoken.say("Hello", "I think")
    async with speak(pods[0].client, session_id, "Hello", agent="hasty") as stream:
        events = await rest_of(stream)
    check_whole(events)
    assert events[-1][1:] == (
        "turn.failed",
        {"code": "turn_timeout", "title": "The agent took too long", "retryable": True},
    )
    assert (await pods[0].client.get(f"/api/sessions/{session_id}/messages")).json()["messages"] == []


async def test_what_goes_wrong_before_the_start_is_a_problem_and_no_stream(
    pods: Pods, put_agent: PutAgent, spoken: Spoken, session_id: str
) -> None:
    await put_agent("off", active=False)
    await put_agent("elsewhere", allowed_domains=("other.example",))
    await put_agent("minted", require_token=True)
    await put_agent("text-only", channels=("text",))
    client, body = pods[0].client, {"message": "Hello", "session_id": session_id}

    async def said(agent: str = "shop", **fields: Any) -> httpx.Response:
        return await client.post(f"/api/chat/{agent}/stream", json=body | fields)

    problem(await said("nobody"), 404, "agent_not_found")
    problem(await said("off"), 403, "agent_inactive")
    problem(await said("elsewhere"), 403, "domain_not_allowed")
    problem(await said("minted"), 404, "session_not_found")
    problem(await said("text-only", channel="phone"), 403, "channel_not_allowed")
    problem(await said(message=""), 422, "invalid_field")
    problem(await said(session_id="short"), 422, "invalid_field")
    problem(await said(if_busy="wait"), 422, "invalid_field")
    problem(await client.post("/api/chat/shop/stream", content="{}"), 415, "unsupported_media_type")
    problem(await client.get("/api/chat/shop/stream"), 405, "method_not_allowed")
    await spoken_turn(pods[0], spoken, session_id, "Hello", "Hi")
    problem(await client.post("/api/chat/shop/stream", json=body, headers=SHOP), 404, "session_not_found")
    problem(await said("off", session_id=session_id), 403, "agent_inactive")
    assert (await client.post(f"/api/sessions/{session_id}/end")).status_code == 200
    problem(await said(), 410, "session_ended")


async def test_a_client_that_vanishes_at_any_byte_ends_no_turn(pods: Pods, put_agent: PutAgent, stores: Stores) -> None:
    await put_agent("shop", config={"chunks": 8, "delay_ms": 80})
    async with speak(pods[0].client, new_session_id(), "Hello") as stream:
        await rest_of(stream)
    cuts = [*random.Random(8).sample(range(1, stream.size), 16), 0, stream.size]
    sessions = [new_session_id() for _ in cuts]

    async def vanish(number: int) -> None:
        async with speak(pods[0].client, sessions[number], "Hello", cut_after=cuts[number]) as stream:
            await stream.rest()

    await asyncio.gather(*map(vanish, range(len(cuts))))
    for session_id in sessions:
        await wait_for(lambda session_id=session_id: pods[1].transcript(session_id), "the turn is committed")
        assert await pods[1].transcript(session_id) == ["Hello", "You said: Hello"]
