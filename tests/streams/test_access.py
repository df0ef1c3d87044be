"""Who may read the stream of a turn."""

import httpx
import pytest

from tests.conftest import PutAgent
from tests.streams.steps import SHOP, Pods, problem, rest_of, spoken_turn
from tests.support.pods import rewrite
from tests.support.spoken import Spoken, SpokenPod, new_session_id, stored_events
from tests.support.sse import open_stream, resume, speak


async def foreign_readings(pod: SpokenPod, turn_id: str, session_id: str, cursor: str) -> list[httpx.Response | bytes]:
    """What comes of asking for another session's turn, from the start and behind a cursor."""
    path = f"/api/chat/shop/turns/{turn_id}/stream"
    found: list[httpx.Response | bytes] = []
    for headers in ({}, {"Last-Event-ID": cursor}, {"Last-Event-ID": "0-0"}):
        async with pod.client.stream("GET", path, params={"session_id": session_id}, headers=headers) as answer:
            found.append(await answer.aread())
    return found


@pytest.mark.parametrize("ending", ["runs", "completed", "failed"])
async def test_no_session_is_shown_another_ones_turn(pods: Pods, spoken: Spoken, session_id: str, ending: str) -> None:
    other_session = new_session_id()
    await spoken_turn(pods[0], spoken, other_session, "Mine", "ok")
    spoken.say("Hello", "a secret")
    async with speak(pods[0].client, session_id, "Hello") as stream:
        events = await stream.take(2)
        turn_id = events[0].data["turn_id"]
        await stored_events(pods[0].stores, session_id, turn_id, 2)
        if ending == "completed":
            spoken.end("Hello")
            await rest_of(stream)
        elif ending == "failed":
            spoken.say("Hello", RuntimeError("no more"))
            await rest_of(stream)
        for pod in pods:
            path = f"/api/chat/shop/turns/{turn_id}/stream"
            answer = await pod.client.get(path, params={"session_id": other_session})
            problem(answer, 404, "turn_not_found")
            for found in await foreign_readings(pod, turn_id, other_session, events[0].id):
                assert b"secret" not in (found if isinstance(found, bytes) else found.content)
                assert session_id.encode() not in (found if isinstance(found, bytes) else found.content)
        spoken.end("Hello")


async def test_control_without_the_check_a_log_is_shown_to_whoever_knows_its_turn(
    pods: Pods, spoken: Spoken, session_id: str
) -> None:
    other_session = new_session_id()
    await spoken_turn(pods[0], spoken, other_session, "Mine", "ok")
    events = await spoken_turn(pods[0], spoken, session_id, "Hello", "a secret")
    rewrite(
        pods[1].stores.scripts, "follow", lambda text: text.replace("~= args.session_id then entries", "== '' then entries")
    )
    found = await foreign_readings(pods[1], events[0].data["turn_id"], other_session, events[0].id)
    assert any(b"secret" in (one if isinstance(one, bytes) else one.content) for one in found)


async def test_a_turn_is_not_found_from_elsewhere(pods: Pods, put_agent: PutAgent, spoken: Spoken, session_id: str) -> None:
    await put_agent("rival", graph="spoken")
    spoken.say("Hello", "a secret")
    async with open_stream(
        pods[0].client,
        "POST",
        "/api/chat/shop/stream",
        body={"message": "Hello", "session_id": session_id},
        headers=SHOP,
    ) as stream:
        turn_id = (await stream.take(2))[0].data["turn_id"]
        spoken.end("Hello")
        await rest_of(stream)
    for pod in pods:

        async def asked(agent: str, session: str, turn: str, origin: str, pod: SpokenPod = pod) -> httpx.Response:
            path = f"/api/chat/{agent}/turns/{turn}/stream"
            return await pod.client.get(path, params={"session_id": session}, headers={"Origin": origin})

        here = "https://shop.example"
        assert (await asked("shop", session_id, turn_id, here)).status_code == 200
        problem(await asked("shop", session_id, turn_id, "https://evil.example"), 404, "session_not_found")
        problem(await asked("rival", session_id, turn_id, here), 404, "session_not_found")
        problem(await asked("nobody", session_id, turn_id, here), 404, "agent_not_found")
        problem(await asked("shop", new_session_id(), turn_id, here), 404, "session_not_found")
        problem(await asked("shop", session_id, "01a203d4-aa7a-7721-92a8-6689b18d36ce", here), 404, "turn_not_found")
        problem(await asked("shop", session_id, "no-uuid", here), 404, "turn_not_found")
        problem(await asked("shop", "short", turn_id, here), 422, "invalid_field")


async def test_a_minted_session_is_streamed_to_the_holder_of_its_token_alone(pods: Pods, spoken: Spoken) -> None:
    opened = (await pods[0].client.post("/api/sessions", json={"agent_id": "shop"})).json()
    session_id, token = opened["session_id"], {"Authorization": f"Bearer {opened['session_token']}"}
    spoken.say("Hello", "a secret")
    spoken.end("Hello")
    async with speak(pods[0].client, session_id, "Hello", headers=token) as stream:
        events = await rest_of(stream)
    turn_id = events[0].data["turn_id"]
    async with resume(pods[1].client, session_id, turn_id, headers=token) as stream:
        assert await rest_of(stream) == events
    client, path = pods[1].client, f"/api/chat/shop/turns/{turn_id}/stream?session_id={session_id}"
    problem(await client.get(path), 401, "session_token_required")
    problem(await client.get(f"/api/sessions/{session_id}/events"), 401, "session_token_required")
    problem(await client.get(path, headers={"Authorization": "Bearer nonsense"}), 401, "session_token_invalid")
    body = {"session_id": session_id}
    problem(await client.post("/api/chat/shop/cancel", json=body), 401, "session_token_required")
    problem(await client.post("/api/chat/shop/stream", json=body | {"message": "Hello"}), 401, "session_token_required")
