"""Cancelling a turn, from any pod."""

from typing import Any

import pytest

from gateway.app import Stores
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.streams.steps import SHOP, Pods, problem, rest_of, spoken_turn, waiting
from tests.support.serving import wait_for
from tests.support.spoken import Spoken, spoken_pod
from tests.support.sse import check_whole, kinds, resume, speak, watch


@pytest.mark.parametrize("same", [True, False], ids=["on the same pod", "on another pod"])
async def test_a_cancelled_turn_stops_and_nothing_of_it_stays(
    pods: Pods, spoken: Spoken, session_id: str, same: bool
) -> None:
    second = pods[0 if same else 1]
    await spoken_turn(pods[0], spoken, session_id, "Hello", "Hi")
    before = await session_fields(second.stores, session_id)
    spoken.say("Again", "half an ")
    async with speak(pods[0].client, session_id, "Again", message_id="m-2") as stream:
        turn_id = (await stream.take(2))[0].data["turn_id"]
        async with resume(pods[1].client, session_id, turn_id) as follower:
            await follower.take(2)
            answer = await second.cancel(session_id)
            assert (answer.status_code, answer.json()) == (202, {"turn_id": turn_id})
            for reader in (stream, follower):
                assert [event[1:] for event in await rest_of(reader)] == [("turn.cancelled", {})]
                check_whole(reader.events)
    await wait_for(lambda: spoken.cancelled == ["Again"], "the graph is stopped")
    after = await session_fields(second.stores, session_id)
    assert after == before
    assert await second.transcript(session_id) == ["Hello", "Hi"]
    problem(await second.cancel(session_id), 409, "no_turn_running")
    for pod in pods:
        async with resume(pod.client, session_id, turn_id, stream.events[0].id) as late:
            assert kinds(await rest_of(late)) == ["text.delta", "turn.cancelled"]
    # A retry of what was cancelled is answered anew.
    spoken.say("Again", "a whole answer")
    spoken.end("Again")
    async with speak(second.client, session_id, "Again", message_id="m-2") as stream:
        assert (await rest_of(stream))[-1].data["response"] == "a whole answer"


async def session_fields(stores: Stores, session_id: str) -> dict[bytes, bytes]:
    """The whole session hash."""
    found: dict[bytes, bytes] = await stores.client.execute_command("HGETALL", stores.keys.session(session_id))
    return found


async def test_who_waits_for_a_cancelled_answer_is_told(pods: Pods, spoken: Spoken, session_id: str) -> None:
    for canceller in pods:
        asked = pods[0].send("Hello", session_id)
        await spoken.has_started("Hello", len(spoken.started) + 1)
        async with watch(pods[1].client, session_id) as watched:
            await wait_for(lambda: pods[1].pod.streams.follower.turns, "the second tab watches the turn")
            assert (await canceller.cancel(session_id)).status_code == 202
            problem(await asked, 409, "turn_cancelled")
            assert (await watched.take(1))[0][1:] == ("turn.cancelled", {})
    assert await pods[1].transcript(session_id) == []


async def test_what_waits_behind_a_cancelled_turn_is_answered(pods: Pods, spoken: Spoken, session_id: str) -> None:
    first = pods[0].send("First", session_id)
    await spoken.has_started("First")
    spoken.end("Second")
    second = pods[1].send("Second", session_id)
    await wait_for(lambda: waiting(pods[0].stores, session_id), "the second message waits")
    assert (await pods[1].cancel(session_id)).status_code == 202
    problem(await first, 409, "turn_cancelled")
    assert (await second).json()["metadata"]["message_count"] == 2


async def test_where_nothing_runs_there_is_nothing_to_cancel(
    pods: Pods, put_agent: PutAgent, spoken: Spoken, session_id: str
) -> None:
    await put_agent("rival", graph="spoken")
    problem(await pods[0].cancel(session_id), 404, "session_not_found")
    await spoken_turn(pods[0], spoken, session_id, "Hello", "Hi")
    problem(await pods[1].cancel(session_id), 409, "no_turn_running")
    body: dict[str, Any] = {"session_id": session_id}
    client = pods[1].client
    problem(await client.post("/api/chat/rival/cancel", json=body), 404, "session_not_found")
    problem(await client.post("/api/chat/shop/cancel", json=body, headers=SHOP), 404, "session_not_found")
    problem(await client.post("/api/chat/shop/cancel", json={}), 422, "invalid_field")
    problem(await client.post("/api/chat/shop/cancel", json=body | {"turn_id": "x"}), 422, "invalid_field")


async def test_a_cancel_that_the_pod_did_not_hear_of_still_ends_as_one(
    settings: Settings, stores: Stores, spoken: Spoken, put_agent: PutAgent, session_id: str
) -> None:
    """What is published can be lost; the next renewal of the lease tells."""
    await put_agent("shop", graph="spoken")
    async with spoken_pod(settings, spoken, lease_s=1) as pod, spoken_pod(settings, spoken) as other:
        del pod.pod.wakeups._callbacks[stores.keys.control]
        spoken.say("Hello", "half an ")
        async with speak(pod.client, session_id, "Hello") as stream:
            await stream.take(2)
            assert (await other.cancel(session_id)).status_code == 202
            assert [event[1:] for event in await rest_of(stream)] == [("turn.cancelled", {})]
        pod.pod.wakeups._callbacks[stores.keys.control] = []
