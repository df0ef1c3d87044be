"""The same message sent again: answered from what is stored, or attached to the turn that runs."""

from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.streams.steps import Pods, problem, rest_of, spoken_turn
from tests.support.spoken import Spoken
from tests.support.sse import check_whole, kinds, resume, speak, text_of


@pytest.mark.parametrize("header", [False, True], ids=["message_id in the body", "Idempotency-Key"])
async def test_a_message_sent_again_is_answered_from_what_is_stored(
    pods: Pods, spoken: Spoken, session_id: str, header: bool
) -> None:
    options: dict[str, Any] = {"headers": {"Idempotency-Key": "m-1"}} if header else {"message_id": "m-1"}
    spoken.say("Hello", "one ", "two ")
    spoken.end("Hello")
    async with speak(pods[0].client, session_id, "Hello", **options) as stream:
        first = await rest_of(stream)
    for pod in pods:
        async with speak(pod.client, session_id, "Hello", **options) as stream:
            again = await rest_of(stream)
        check_whole(again, again[0].n)
        assert kinds(again) == ["turn.started", "text.delta", "turn.completed"]
        assert text_of(again) == text_of(first)
        assert again[0].data == first[0].data
        assert again[-1].data["response"] == first[-1].data["response"]
        assert again[-1].data["metadata"] == first[-1].data["metadata"] | {"replayed": True}
        # Whichever of the two the client goes on from: no text twice, and the end.
        for event in again:
            async with resume(pod.client, session_id, first[0].data["turn_id"], event.id) as stream:
                rest = await rest_of(stream)
            assert kinds(rest)[-1] == "turn.completed"
            if event.kind == "text.delta":
                assert "log.reset" in kinds(rest) or text_of(rest) == ""
    body = {"message": "Hello", "session_id": session_id, "message_id": "m-1"}
    answer = (await pods[1].client.post("/api/chat/shop/message", json=body)).json()
    assert answer["metadata"] == first[-1].data["metadata"] | {"replayed": True}
    assert spoken.started == ["Hello"]


@pytest.mark.parametrize("same", [True, False], ids=["on the same pod", "on another pod"])
async def test_a_message_sent_again_while_it_runs_attaches_to_its_turn(
    pods: Pods, spoken: Spoken, session_id: str, same: bool
) -> None:
    second = pods[0 if same else 1]
    spoken.say("Hello", "one ")
    async with speak(pods[0].client, session_id, "Hello", message_id="m-1") as stream:
        await stream.take(2)
        waiting = second.send("Hello", session_id, message_id="m-1")
        for if_busy in ("queue", "reject", "interrupt"):
            async with speak(second.client, session_id, "Hello", message_id="m-1", if_busy=if_busy) as again:
                assert await again.take(2) == stream.events
        async with speak(second.client, session_id, "Hello", headers={"Idempotency-Key": '"m-1"'}) as again:
            spoken.say("Hello", "two ")
            spoken.end("Hello")
            await rest_of(again)
        await rest_of(stream)
    assert again.events == stream.events
    check_whole(stream.events)
    answer = (await waiting).json()
    assert answer["response"] == "one two "
    assert answer["metadata"]["turn_id"] == stream.events[0].data["turn_id"]
    assert spoken.started == ["Hello"]
    assert len(await second.transcript(session_id)) == 2


async def test_a_stream_attaches_to_a_turn_that_was_not_to_be_streamed(pods: Pods, spoken: Spoken, session_id: str) -> None:
    asked = pods[0].send("Hello", session_id, message_id="m-1")
    await spoken.has_started("Hello")
    async with AsyncExitStack() as stack:
        attached = [
            await stack.enter_async_context(speak(pod.client, session_id, "Hello", message_id="m-1")) for pod in pods
        ]
        spoken.say("Hello", "one ")
        spoken.end("Hello")
        for stream in attached:
            events = await rest_of(stream)
            assert kinds(events) == ["turn.started", "text.delta", "turn.completed"]
            assert events[-1].data == (await asked).json()


async def test_a_message_id_of_another_message_is_refused(pods: Pods, spoken: Spoken, session_id: str) -> None:
    await spoken_turn(pods[0], spoken, session_id, "Earlier", "ok")
    spoken.end("Hello")
    async with speak(pods[0].client, session_id, "Hello", message_id="m-1") as stream:
        await rest_of(stream)
    body = {"message": "Something else", "session_id": session_id}
    for pod in pods:
        for call in ("stream", "message"):
            path = f"/api/chat/shop/{call}"
            problem(await pod.client.post(path, json=body | {"message_id": "m-1"}), 422, "message_id_reused")
            problem(await pod.client.post(path, json=body, headers={"Idempotency-Key": "m-1"}), 422, "message_id_reused")
    document = problem(
        await pods[0].client.post("/api/chat/shop/stream", json=body, headers={"Idempotency-Key": "no good"}),
        422,
        "invalid_field",
    )
    assert document["field"] == "Idempotency-Key"


async def test_a_message_id_of_another_message_is_refused_while_that_one_runs(
    pods: Pods, spoken: Spoken, session_id: str
) -> None:
    spoken.say("Hello", "a private answer")
    async with speak(pods[0].client, session_id, "Hello", message_id="m-1") as stream:
        await stream.take(2)
        body = {"message": "Something else", "session_id": session_id, "message_id": "m-1"}
        for pod in pods:
            async with pod.client.stream("POST", "/api/chat/shop/stream", json=body) as answer:
                assert answer.status_code == 422, "it was attached to the turn of another message"
        spoken.end("Hello")
