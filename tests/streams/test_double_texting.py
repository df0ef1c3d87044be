"""A second message while a turn runs: it waits, is rejected, or interrupts."""

import asyncio
from contextlib import AsyncExitStack
from typing import Any

import pytest

from tests.conftest import PutAgent
from tests.streams.steps import Pods, problem, rest_of, spoken_turn, waiting
from tests.support.serving import wait_for
from tests.support.spoken import Spoken, SpokenPod
from tests.support.sse import kinds, speak


@pytest.mark.parametrize("first", ["stream", "message"])
async def test_a_second_message_waits_for_the_first_on_any_pod(
    pods: Pods, spoken: Spoken, session_id: str, first: str
) -> None:
    async with AsyncExitStack() as stack:
        started = asyncio.create_task(post(pods[0], first, session_id, "First"))
        await spoken.has_started("First")
        second_call = "message" if first == "stream" else "stream"
        second = asyncio.create_task(post(pods[1], second_call, session_id, "Second"))
        stack.callback(second.cancel)
        await wait_for(lambda: waiting(pods[0].stores, session_id), "the second message waits")
        assert spoken.started == ["First"]
        spoken.end("First", "Second")
        assert (await started)["message_count"] == 2
        assert (await second)["message_count"] == 4
    assert await pods[0].transcript(session_id) == ["First", "Answer to First", "Second", "Answer to Second"]


async def post(pod: SpokenPod, call: str, session_id: str, message: str, **fields: Any) -> dict[str, Any]:
    """Has a message answered by either call; the answer's metadata."""
    if call == "message":
        answer = await pod.ask(message, session_id, **fields)
        assert answer.status_code == 200, answer.text
        metadata: dict[str, Any] = answer.json()["metadata"]
        return metadata
    async with speak(pod.client, session_id, message, **fields) as stream:
        found: dict[str, Any] = (await rest_of(stream))[-1].data["metadata"]
        return found


async def test_a_second_message_is_rejected_where_that_is_wanted(
    pods: Pods, spoken: Spoken, session_id: str, put_agent: PutAgent
) -> None:
    async with speak(pods[0].client, session_id, "First") as stream:
        await stream.take(1)
        body = {"message": "Second", "session_id": session_id, "if_busy": "reject"}
        for pod in pods:
            for call in ("stream", "message"):
                answer = await pod.client.post(f"/api/chat/shop/{call}", json=body)
                document = problem(answer, 409, "turn_in_progress")
                assert document["retryable"]
                assert int(answer.headers["retry-after"]) >= 1
        spoken.end("First")
        await rest_of(stream)
    assert spoken.started == ["First"]


@pytest.mark.parametrize("first", ["stream", "message"])
@pytest.mark.parametrize("second", ["stream", "message"])
async def test_a_second_message_interrupts_the_first_on_any_pod(
    pods: Pods, spoken: Spoken, session_id: str, first: str, second: str
) -> None:
    await spoken_turn(pods[0], spoken, session_id, "Hello", "Hi")
    spoken.end("Second")
    if first == "message":
        asked = pods[0].send("First", session_id)
        await spoken.has_started("First")
        metadata = await post(pods[1], second, session_id, "Second", if_busy="interrupt")
        problem(await asked, 409, "turn_cancelled")
    else:
        spoken.say("First", "half an ")
        async with speak(pods[0].client, session_id, "First") as stream:
            await stream.take(2)
            metadata = await post(pods[1], second, session_id, "Second", if_busy="interrupt")
            assert kinds(await rest_of(stream)) == ["turn.cancelled"]
    assert metadata["message_count"] == 4
    await wait_for(lambda: spoken.cancelled == ["First"], "the graph is stopped")
    assert await pods[1].transcript(session_id) == ["Hello", "Hi", "Second", "Answer to Second"]


async def test_what_waits_keeps_its_place_when_the_running_turn_is_interrupted(
    pods: Pods, spoken: Spoken, session_id: str
) -> None:
    first = pods[0].send("First", session_id)
    await spoken.has_started("First")
    queued = pods[0].send("Queued", session_id)
    await wait_for(lambda: waiting(pods[0].stores, session_id), "a message waits")
    spoken.end("Queued", "Urgent")
    urgent = await post(pods[1], "stream", session_id, "Urgent", if_busy="interrupt")
    problem(await first, 409, "turn_cancelled")
    assert (urgent["message_count"], (await queued).json()["metadata"]["message_count"]) == (2, 4)
