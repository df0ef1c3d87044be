"""Streamed turns over HTTP: their events, resuming on any pod, cancelling, double texting, retries, the second tab."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from hashlib import sha1
from typing import Any

import httpx
import pytest
import structlog

from gateway.app import Stores
from gateway.settings import Settings
from gateway.streams import follow
from gateway.streams import log as log_module
from persistence.model.agents import TurnPolicy
from persistence.model.session import Access
from persistence.redis import log_entries as logs
from persistence.redis.connection import connect
from persistence.redis.outcomes import Begun
from persistence.redis.scripts import Scripts
from persistence.redis.wakeups import WakeUps
from persistence.worker import Worker
from tests.conftest import PutAgent
from tests.support.rule import all_keys
from tests.support.serving import wait_for
from tests.support.spoken import Spoken, SpokenPod, new_session_id, spoken_pod
from tests.support.sse import (
    TERMINAL,
    Event,
    Stream,
    check_whole,
    kinds,
    open_stream,
    resume,
    speak,
    text_of,
    watch,
)

Pods = tuple[SpokenPod, SpokenPod]
SHOP = {"Origin": "https://shop.example"}


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


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Checks that an answer is that problem; its document."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    document: dict[str, Any] = answer.json()
    assert document["code"] == code, document
    return document


async def refused(client: httpx.AsyncClient, method: str, path: str, **options: Any) -> httpx.Response:
    """The answer to a request for a stream that must not become one."""
    return await client.request(method, path, **options)


async def spoken_turn(pod: SpokenPod, spoken: Spoken, session_id: str, message: str, *pieces: str) -> list[Event]:
    """A whole streamed turn; its events."""
    spoken.say(message, *pieces)
    spoken.end(message)
    async with speak(pod.client, session_id, message) as stream:
        return await rest_of(stream)


async def rest_of(stream: Stream) -> list[Event]:
    """All events up to the end of a stream that must come to one."""
    return await asyncio.wait_for(stream.rest(), 20)


async def stored_events(stores: Stores, session_id: str, turn_id: str, last: int) -> None:
    """Waits until the log of a turn in Redis has come to event number `last`."""

    async def stored() -> bool:
        entries = await stores.client.execute_command(
            "XREVRANGE", stores.keys.events(session_id, turn_id), "+", "-", "COUNT", 1
        )
        return bool(entries) and int(entries[0][0].split(b"-")[1]) >= last

    await wait_for(stored, f"event {last} is in Redis")


def rewrite(scripts: Scripts, name: str, change: Callable[[str], str]) -> None:
    """Takes a guard out of a script, for these `scripts` alone: what controls are made of."""
    text = change(scripts._texts[name])
    assert text != scripts._texts[name], f"nothing was changed in {name}"
    scripts._texts[name] = text
    scripts._digests[name] = sha1(text.encode()).hexdigest()


# ------------------------------------------------------------------------------------------------------ what is streamed


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


# -------------------------------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("same", [True, False], ids=["on the same pod", "on another pod"])
async def test_a_stream_is_resumed_while_its_turn_runs(pods: Pods, spoken: Spoken, session_id: str, same: bool) -> None:
    second = pods[0 if same else 1]
    spoken.say("Hello", "one ", "two ")
    async with speak(pods[0].client, session_id, "Hello") as stream:
        seen = await stream.take(3)
    turn_id = seen[0].data["turn_id"]
    async with (
        resume(second.client, session_id, turn_id, stream.cursor) as after,
        resume(second.client, session_id, turn_id) as whole,
    ):
        assert await whole.take(3) == seen
        for piece in ("three ", "four "):
            spoken.say("Hello", piece)
            assert (await after.next()).data == (await whole.next()).data == {"text": piece}
        spoken.end("Hello")
        assert await rest_of(after) == await rest_of(whole)
    check_whole(whole.events)
    assert seen + after.events == whole.events
    assert text_of(whole.events) == "one two three four " == whole.events[-1].data["response"]


async def test_a_stream_is_resumed_after_its_turn_from_every_cursor_on_every_pod(
    pods: Pods, spoken: Spoken, session_id: str
) -> None:
    events = await spoken_turn(pods[0], spoken, session_id, "Hello", "one ", "two ", "three ")
    turn_id, epoch = events[0].data["turn_id"], events[0].epoch
    for pod in pods:
        for seen in range(len(events)):
            async with resume(pod.client, session_id, turn_id, f"{epoch}-{seen}") as stream:
                assert await rest_of(stream) == events[seen:]
        # At the end and beyond it there is nothing but the end.
        for n in (events[-1].n, events[-1].n + 7):
            async with resume(pod.client, session_id, turn_id, f"{epoch}-{n}") as stream:
                assert [event[1:] for event in await rest_of(stream)] == [events[-1][1:]]
                assert stream.events[0].n == n


async def test_behind_a_cursor_beyond_what_is_there_comes_only_the_end(pods: Pods, spoken: Spoken, session_id: str) -> None:
    """A client of the pod that died may have seen more than Redis has."""
    spoken.say("Hello", "one ")
    async with speak(pods[0].client, session_id, "Hello") as stream:
        await stream.take(2)
    turn_id, epoch = stream.events[0].data["turn_id"], stream.events[0].epoch
    async with resume(pods[1].client, session_id, turn_id, f"{epoch}-50") as ahead:
        spoken.say("Hello", "two ")
        spoken.end("Hello")
        assert kinds(await rest_of(ahead)) == ["turn.completed"]


async def test_without_its_log_a_turn_is_told_from_the_transcript(
    pods: Pods, spoken: Spoken, session_id: str, stores: Stores
) -> None:
    events = await spoken_turn(pods[0], spoken, session_id, "Hello", "one ", "two ", "three ")
    turn_id = events[0].data["turn_id"]
    assert await stores.client.delete(stores.keys.events(session_id, turn_id)) == 1
    for pod in pods:
        async with resume(pod.client, session_id, turn_id) as stream:
            whole = await rest_of(stream)
        check_whole(whole, whole[0].n)
        assert kinds(whole) == ["turn.started", "text.delta", "turn.completed"]
        assert text_of(whole) == "one two three "
        assert whole[-1].data == events[-1].data
        async with resume(pod.client, session_id, turn_id, whole[1].id) as stream:
            assert await rest_of(stream) == whole[2:]


async def test_a_cursor_in_a_log_that_is_gone_is_answered_with_a_reset(
    pods: Pods, spoken: Spoken, session_id: str, stores: Stores
) -> None:
    events = await spoken_turn(pods[0], spoken, session_id, "Hello", "one ", "two ", "three ")
    turn_id = events[0].data["turn_id"]
    await stores.client.delete(stores.keys.events(session_id, turn_id))
    for pod in pods:
        for seen in events[:-1]:
            async with resume(pod.client, session_id, turn_id, seen.id) as stream:
                assert kinds(await rest_of(stream)) == ["log.reset", "turn.started", "text.delta", "turn.completed"]


async def test_a_cursor_of_another_epoch_is_answered_with_a_reset(pods: Pods, spoken: Spoken, session_id: str) -> None:
    spoken.say("Hello", "one ")
    async with speak(pods[0].client, session_id, "Hello") as stream:
        events = await stream.take(2)
        turn_id, cursor = events[0].data["turn_id"], f"{events[0].epoch + 9}-1"
        running = [resume(pod.client, session_id, turn_id, cursor) for pod in pods]
        async with running[0] as one, running[1] as other:
            for again in (one, other):
                assert kinds(await again.take(3)) == ["log.reset", "turn.started", "text.delta"]
            spoken.end("Hello")
            for again in (one, other):
                assert kinds(await rest_of(again)) == ["turn.completed"]
    for pod in pods:
        async with resume(pod.client, session_id, turn_id, cursor) as stream:
            assert kinds(await rest_of(stream)) == ["log.reset", "turn.started", "text.delta", "turn.completed"]


@pytest.mark.parametrize("cursor", ["7", "7-", "-7", "a-b", "1-2-3", "1--2", "1.5-2", "1-2 3", "1" * 41 + "-1", "-1-2"])
async def test_a_malformed_cursor_is_refused(pods: Pods, spoken: Spoken, session_id: str, cursor: str) -> None:
    events = await spoken_turn(pods[0], spoken, session_id, "Hello", "Hi")
    path = f"/api/chat/shop/turns/{events[0].data['turn_id']}/stream?session_id={session_id}"
    for address in (path, f"/api/sessions/{session_id}/events"):
        document = problem(await pods[0].client.get(address, headers={"Last-Event-ID": cursor}), 422, "invalid_field")
        assert document["field"] == "Last-Event-ID"


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


async def test_heartbeats_keep_idle_streams_open(
    pods: Pods, spoken: Spoken, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "HEARTBEAT_S", 0.05)
    async with speak(pods[0].client, session_id, "Hello") as stream:
        turn_id = (await stream.take(1))[0].data["turn_id"]
        async with (
            resume(pods[1].client, session_id, turn_id) as resumed,
            watch(pods[1].client, session_id) as watched,
        ):
            for open_one in (stream, resumed, watched):
                while open_one.comments < 3:
                    assert await asyncio.wait_for(open_one.read_chunk(), 10)
            spoken.end("Hello")
            assert kinds(await rest_of(stream))[-1] == kinds(await rest_of(resumed))[-1] == "turn.completed"
            await watched.until("turn.completed")
            seen = watched.comments
            while watched.comments < seen + 2:
                assert await asyncio.wait_for(watched.read_chunk(), 10)


async def test_readers_that_leave_are_forgotten(pods: Pods, spoken: Spoken, session_id: str) -> None:
    async with speak(pods[0].client, session_id, "Hello") as stream:
        turn_id = (await stream.take(1))[0].data["turn_id"]
        async with resume(pods[1].client, session_id, turn_id) as one, resume(pods[1].client, session_id, turn_id) as two:
            async with watch(pods[1].client, session_id) as watched:
                for reader in (one, two, watched):
                    await reader.take(1)
            assert pods[1].wakeups == {pods[1].stores.keys.channel(session_id)}
            assert len(pods[1].pod.streams._followed) == 1
    await wait_for(lambda: not pods[1].wakeups and not pods[1].pod.streams._followed, "the readers are forgotten")
    spoken.end("Hello")
    await wait_for(lambda: not pods[0].pod.streams._own, "the turn is forgotten")


async def test_who_comes_as_the_last_reader_leaves_is_served(pods: Pods, spoken: Spoken, session_id: str) -> None:
    """Between the moment in which a stream is opened and the one in which it is first read, the last reader can leave."""
    async with speak(pods[0].client, session_id, "Hello") as stream:
        turn_id = (await stream.take(1))[0].data["turn_id"]
        there, access = pods[1].pod.streams, Access()
        first = await there.open_turn(session_id, turn_id, access, None)
        await anext(first)
        second = await there.open_turn(session_id, turn_id, access, None)
        never_read = await there.open_turn(session_id, turn_id, access, None)
        await first.aclose()  # type: ignore[attr-defined]
        spoken.end("Hello")
        read = b"".join([chunk async for chunk in limited(second)])
        assert b"event: turn.completed" in read
        del never_read
    await wait_for(lambda: not there._followed and not pods[1].wakeups, "nothing is left behind")


async def limited(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """What comes to its end within the time of a test."""
    async with asyncio.timeout(20):
        async for chunk in chunks:
            yield chunk


async def test_many_readers_of_a_turn_are_one_reader_of_redis(pods: Pods, spoken: Spoken, session_id: str) -> None:
    async with AsyncExitStack() as stack:
        stream = await stack.enter_async_context(speak(pods[0].client, session_id, "Hello"))
        turn_id = (await stream.take(1))[0].data["turn_id"]
        readers = [await stack.enter_async_context(resume(pods[1].client, session_id, turn_id)) for _ in range(8)]
        for reader in readers:
            await reader.take(1)
        before = await script_calls(pods[1].stores)
        for n in range(5):
            spoken.say("Hello", f"{n} ")
            await stored_events(pods[1].stores, session_id, turn_id, n + 2)
        spoken.end("Hello")
        for reader in readers:
            await rest_of(reader)
            assert text_of(reader.events) == "0 1 2 3 4 "
        # Six appended parts, and about as many readings of them, instead of eight times that.
        assert await script_calls(pods[1].stores) - before < 30


async def script_calls(stores: Stores) -> int:
    """How many scripts Redis has run."""
    found = await stores.client.execute_command("INFO", "commandstats")
    return sum(int(found.get(name, {"calls": 0})["calls"]) for name in ("cmdstat_evalsha", "cmdstat_eval"))


# ------------------------------------------------------------------------------------------------------- bounds, slowness


async def test_a_log_is_bounded_and_a_late_reader_is_told(
    pods: Pods, spoken: Spoken, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "MAX_EVENTS", 20)
    monkeypatch.setattr(log_module, "COALESCE_S", 0.001)
    words = [f"{n} " for n in range(100)]
    async with speak(pods[0].client, session_id, "Hello") as stream:
        turn_id = (await stream.take(1))[0].data["turn_id"]
        for word in words:
            spoken.say("Hello", word)
            await stream.take(1)
        await stored_events(pods[0].stores, session_id, turn_id, len(words) + 1)
        for pod in pods:
            async with (
                resume(pod.client, session_id, turn_id) as late,
                resume(pod.client, session_id, turn_id, stream.cursor) as near,
            ):
                reset, following = await late.take(2)
                assert (reset.kind, reset.n + 1) == ("log.reset", following.n)
                assert following.data["text"] == words[following.n - 2]
                spoken.say("Hello", "and ")
                assert (await near.take(1))[0].data == {"text": "and "}
        spoken.end("Hello")
        await rest_of(stream)
    check_whole(stream.events)
    assert text_of(stream.events) == stream.events[-1].data["response"] == "".join(words) + "and and "
    key = pods[0].stores.keys.events(session_id, turn_id)
    entries = await pods[0].stores.client.execute_command("XLEN", key)
    assert entries <= 21
    assert 0 < await pods[0].stores.client.pttl(key) <= 300_000
    for pod in pods:
        async with resume(pod.client, session_id, turn_id) as late:
            events = await rest_of(late)
        assert events[0].kind == "log.reset"
        check_whole(events[1:], events[0].n + 1)
        assert events[1:] == stream.events[events[0].n :]
        async with resume(pod.client, session_id, turn_id, stream.events[-5].id) as near:
            assert await rest_of(near) == stream.events[-4:]


async def test_what_was_dropped_before_redis_had_it_is_no_silent_gap(
    pods: Pods, spoken: Spoken, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A burst beyond the bound, faster than Redis is written to."""
    monkeypatch.setattr(log_module, "MAX_EVENTS", 20)
    monkeypatch.setattr(log_module, "COALESCE_S", 0.3)
    words = [f"{n} " for n in range(95)]
    async with speak(pods[0].client, session_id, "Hello") as stream:
        turn_id = (await stream.take(1))[0].data["turn_id"]
        async with resume(pods[1].client, session_id, turn_id, stream.cursor) as follower:
            for word in words:
                spoken.say("Hello", word)
                await stream.take(1)
            await stored_events(pods[0].stores, session_id, turn_id, len(words) + 1)
            reset, *events = await follower.take(5)
            assert reset.kind == "log.reset"
            assert [event[1:] for event in events] == [event[1:] for event in stream.events[events[0].n - 1 :][:4]]
        spoken.end("Hello")
        await rest_of(stream)
    for pod in pods:
        async with resume(pod.client, session_id, turn_id, stream.events[3].id) as late:
            reset, *events = await rest_of(late)
        assert reset.kind == "log.reset"
        assert events == stream.events[reset.n :]


async def test_a_log_is_bounded_in_bytes(
    pods: Pods, spoken: Spoken, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "MAX_BYTES", 10_000)
    monkeypatch.setattr(log_module, "COALESCE_S", 0.001)
    async with speak(pods[0].client, session_id, "Hello") as stream:
        turn_id = (await stream.take(1))[0].data["turn_id"]
        for n in range(60):
            spoken.say("Hello", f"{n}".ljust(1000, "."))
            await stream.take(1)
        spoken.say("Hello", "x" * 30_000)
        spoken.say("Hello", "last")
        await stream.take(2)
        log = pods[0].pod.streams._own[turn_id]
        assert sum(len(event.data) for event in log.events) <= 40_000
        spoken.end("Hello")
        await rest_of(stream)
    check_whole(stream.events)
    assert len(stream.events[-1].data["response"]) == 90_004
    for pod in pods:
        async with resume(pod.client, session_id, turn_id) as late:
            reset, *events = await rest_of(late)
        assert reset.kind == "log.reset"
        assert events == stream.events[reset.n :]


async def test_a_slow_reader_slows_nobody_and_holds_no_memory(
    pods: Pods, spoken: Spoken, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_module, "MAX_BYTES", 100_000)
    piece, pieces = "x" * 10_000, 1_000
    async with speak(pods[0].client, session_id, "Hello") as stream:
        turn_id = (await stream.take(1))[0].data["turn_id"]
        async with (
            resume(pods[0].client, session_id, turn_id) as slow,
            resume(pods[1].client, session_id, turn_id) as slow_elsewhere,
        ):
            # Both have begun, and read no more for now: 10 MB fit into no socket.
            for reader in (slow, slow_elsewhere):
                await reader.take(1)
            for _ in range(pieces // 4):
                spoken.say("Hello", *[piece] * 4)
                await stream.take(4)
            spoken.end("Hello")
            await stream.until("turn.completed")
            check_whole(stream.events)
            assert len(text_of(stream.events)) == pieces * len(piece)
            assert len(await pods[1].transcript(session_id)) == 2
            for reader in (slow, slow_elsewhere):
                events = await rest_of(reader)
                assert "log.reset" in kinds(events)
                assert events[-1] == stream.events[-1]
                assert len(text_of(events)) < pieces * len(piece) / 2


# ---------------------------------------------------------------------------------------------- the same message twice


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


# -------------------------------------------------------------------------------------------------------------- cancelling


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
            await wait_for(lambda: pods[1].pod.streams._followed, "the second tab watches the turn")
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


async def waiting(stores: Stores, session_id: str) -> list[str]:
    """The turns that wait, in order."""
    field = await stores.client.execute_command("HGET", stores.keys.session(session_id), "waiting") or b""
    return [waiter.split("@")[0] for waiter in field.decode().split()]


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


# ----------------------------------------------------------------------------------------------------------- double texting


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


# ----------------------------------------------------------------------------------------------------------- the second tab


async def test_the_second_tab_sees_every_turn_as_it_happens(pods: Pods, spoken: Spoken, session_id: str) -> None:
    await spoken_turn(pods[0], spoken, session_id, "Earlier", "ok")
    async with watch(pods[1].client, session_id) as here, watch(pods[0].client, session_id) as there:
        async with speak(pods[0].client, session_id, "Hello") as stream:
            await stream.take(1)
            spoken.say("Hello", "one ")
            await stream.take(1)
            for tab in (here, there):
                assert await tab.take(2) == stream.events
            spoken.end("Hello")
            await rest_of(stream)
        for tab in (here, there):
            await tab.until("turn.completed")
            assert tab.events == stream.events
        spoken.say("Asked", "an answer")
        spoken.end("Asked")
        answer = (await pods[0].ask("Asked", session_id)).json()
        for tab in (here, there):
            events = await tab.take(3)
            assert kinds(events) == ["turn.started", "text.delta", "turn.completed"]
            assert events[0].data["message"] == "Asked", "the question, for a device that did not ask it"
            assert events[-1].data == answer
            assert len(tab.events) == len(stream.events) + 3


async def test_the_second_tab_goes_on_from_any_cursor_without_a_gap_or_a_double(
    pods: Pods, spoken: Spoken, session_id: str
) -> None:
    await spoken_turn(pods[0], spoken, session_id, "Earlier", "ok")
    async with watch(pods[1].client, session_id) as tab:
        for message in ("One", "Two", "Three"):
            await spoken_turn(pods[0], spoken, session_id, message, f"{message} a ", f"{message} b ")
            await tab.until("turn.completed")
        spoken.end("Four")
        await pods[0].ask("Four", session_id)
        await tab.until("turn.completed")
    whole = tab.events
    assert text_of(whole) == "One a One b Two a Two b Three a Three b Answer to Four"
    assert len({event.id for event in whole}) == len(whole) == 4 + 4 + 4 + 3 + 0
    for pod in pods:
        for seen in range(1, len(whole) + 1):
            async with watch(pod.client, session_id, whole[seen - 1].id) as again:
                assert await again.take(len(whole) - seen) == whole[seen:]
    # And what comes next, comes once.
    async with AsyncExitStack() as stack:
        tabs = [await stack.enter_async_context(watch(pod.client, session_id, whole[-1].id)) for pod in pods]
        spoken.end("Five")
        last = await spoken_turn(pods[1], spoken, session_id, "Five")
        for again in tabs:
            assert await again.take(3) == last


async def test_the_second_tab_resumes_in_the_middle_of_a_running_turn(pods: Pods, spoken: Spoken, session_id: str) -> None:
    spoken.say("Hello", "one ", "two ")
    async with speak(pods[0].client, session_id, "Hello") as stream:
        await stream.take(3)
        for pod in pods:
            async with watch(pod.client, session_id, stream.events[1].id) as tab:
                assert await tab.take(1) == stream.events[2:3]
        async with watch(pods[1].client, session_id, stream.cursor) as tab:
            spoken.say("Hello", "three ")
            spoken.end("Hello")
            assert text_of(await tab.take(2)) == "three "
            await rest_of(stream)
            assert tab.events == stream.events[3:]


async def test_the_second_tab_is_told_when_its_cursor_is_of_no_use(
    pods: Pods, spoken: Spoken, session_id: str, stores: Stores
) -> None:
    events = await spoken_turn(pods[0], spoken, session_id, "Hello", "one ")
    await stores.client.delete(stores.keys.events(session_id, events[0].data["turn_id"]))
    cursors = [events[1].id, events[-1].id, f"{events[0].epoch - 1}-2", f"{events[0].epoch + 1000}-2"]
    async with AsyncExitStack() as stack:
        tabs = [await stack.enter_async_context(watch(pod.client, session_id, cursor)) for pod in pods for cursor in cursors]
        for tab in tabs:
            assert kinds(await tab.take(1)) == ["log.reset"]
        again = await spoken_turn(pods[0], spoken, session_id, "Again", "two ")
        for tab in tabs:
            assert await tab.take(3) == again
        # The cursor of the reset is a good one.
        async with watch(pods[1].client, session_id, tabs[0].events[0].id) as tab:
            assert await tab.take(3) == again


async def test_the_second_tab_sees_how_a_turn_of_a_dead_pod_ended(
    pods: Pods, spoken: Spoken, session_id: str, stores: Stores
) -> None:
    """The tab has seen one event more than Redis, and the made-up end has the number of that one."""
    await spoken_turn(pods[0], spoken, session_id, "Hello", "Hi")
    monologue = await begin_and_die(pods[0], stores, session_id)
    async with watch(pods[1].client, session_id, f"{monologue.fence}-2") as tab:
        event = (await tab.take(1))[0]
    assert event[1:] == (
        "turn.failed",
        {"code": "turn_lost", "title": "The turn ended without an answer", "retryable": True},
    )


async def begin_and_die(pod: SpokenPod, stores: Stores, session_id: str) -> Begun:
    """Begins a turn, with one event in its log, that no pod will ever renew or end."""
    turn_id, fence = "01a203d4-aa7a-7721-92a8-6689b18d36ce", 0
    lease_ms, stores.sessions.lease_ms = stores.sessions.lease_ms, 300
    agent = await stores.agents.load("shop")
    begun = await stores.sessions.begin(session_id, turn_id, Access(agent.id), TurnPolicy(25, 1800))
    stores.sessions.lease_ms = lease_ms
    assert isinstance(begun, Begun)
    fence = begun.fence
    writer = log_module.TurnWriter(stores.logs, session_id, turn_id, fence)
    writer.emit("turn.started", {"turn_id": turn_id, "session_id": session_id})
    await stored_events(stores, session_id, turn_id, 1)
    return begun


async def test_a_turn_of_a_dead_pod_ends_for_those_who_resume_it(
    pods: Pods, spoken: Spoken, session_id: str, stores: Stores
) -> None:
    await spoken_turn(pods[0], spoken, session_id, "Hello", "Hi")
    begun = await begin_and_die(pods[0], stores, session_id)
    turn_id = "01a203d4-aa7a-7721-92a8-6689b18d36ce"
    for cursor in (None, f"{begun.fence}-0", f"{begun.fence}-1", f"{begun.fence}-9"):
        async with resume(pods[1].client, session_id, turn_id, cursor) as stream:
            events = await rest_of(stream)
        assert events[-1].kind == "turn.failed"
        assert (events[-1].data["code"], events[-1].data["retryable"]) == ("turn_lost", True)
        assert [event.kind for event in events if event.kind in TERMINAL] == ["turn.failed"]
    spoken.end("Next")
    assert (await pods[0].ask("Next", session_id)).status_code == 200


async def test_a_watched_session_that_there_is_not_is_a_problem(pods: Pods, spoken: Spoken, session_id: str) -> None:
    client = pods[0].client
    problem(await client.get(f"/api/sessions/{session_id}/events"), 404, "session_not_found")
    await spoken_turn(pods[0], spoken, session_id, "Hello", "Hi")
    problem(await client.get(f"/api/sessions/{session_id}/events", headers=SHOP), 404, "session_not_found")
    problem(await client.get("/api/sessions/short/events"), 404, "session_not_found")


async def test_the_second_tab_ends_when_the_pod_goes_away(pods: Pods, spoken: Spoken, session_id: str) -> None:
    await spoken_turn(pods[0], spoken, session_id, "Hello", "Hi")
    async with speak(pods[0].client, session_id, "Again") as stream:
        turn_id = (await stream.take(1))[0].data["turn_id"]
        async with watch(pods[1].client, session_id) as idle, resume(pods[1].client, session_id, turn_id) as follower:
            await idle.take(1)
            await follower.take(1)
            pods[1].pod.begin_drain()
            # The turn runs elsewhere, and can be followed elsewhere: nobody waits here for its end.
            assert await rest_of(idle) == await rest_of(follower) == []
        async with resume(pods[1].client, session_id, turn_id) as late:
            assert await rest_of(late) == stream.events
        async with (
            watch(pods[0].client, session_id, idle.cursor) as tab,
            resume(pods[0].client, session_id, turn_id, follower.cursor) as follower,
        ):
            spoken.end("Again")
            assert await rest_of(follower) == (await rest_of(stream))[-2:] == await tab.take(2)
    answer = await pods[1].client.get(f"/api/sessions/{session_id}/events")
    assert problem(answer, 503, "draining")["retryable"]
    async with watch(pods[0].client, session_id, tab.cursor) as tab:
        spoken.end("Third")
        assert await spoken_turn(pods[0], spoken, session_id, "Third") == await tab.take(3)


async def test_a_second_tab_on_the_pod_that_runs_the_turn_sees_its_end_before_the_pod_goes_away(
    pods: Pods, spoken: Spoken, session_id: str
) -> None:
    await spoken_turn(pods[0], spoken, session_id, "Hello", "Hi")
    async with speak(pods[0].client, session_id, "Again") as stream, watch(pods[0].client, session_id) as tab:
        assert await stream.take(1) == await tab.take(1)
        pods[0].pod.begin_drain()
        spoken.end("Again")
        ended = await rest_of(stream)
        assert kinds(ended)[-1] == "turn.completed"
        assert await rest_of(tab) == ended


async def test_an_idle_second_tab_ends_when_the_pod_goes_away(pods: Pods, spoken: Spoken, session_id: str) -> None:
    await spoken_turn(pods[0], spoken, session_id, "Hello", "Hi")
    async with watch(pods[1].client, session_id) as tab:
        await wait_for(lambda: pods[1].wakeups, "the tab is watched")
        pods[1].pod.begin_drain()
        assert await rest_of(tab) == []


async def test_an_erased_session_ends_its_streams_and_leaves_no_log(
    pods: Pods, spoken: Spoken, session_id: str, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(follow, "LOOK_AGAIN_S", 0.1)
    monkeypatch.setattr(follow, "HEARTBEAT_S", 0.2)
    first = await spoken_turn(pods[0], spoken, session_id, "Hello", "a secret")
    spoken.say("Again", "another secret")
    async with speak(pods[0].client, session_id, "Again") as stream:
        turn_id = (await stream.take(2))[0].data["turn_id"]
        async with resume(pods[1].client, session_id, turn_id) as follower, watch(pods[1].client, session_id) as tab:
            await follower.take(2)
            await tab.take(2)
            assert (await pods[1].client.delete(f"/api/sessions/{session_id}")).status_code == 204
            assert kinds(await rest_of(follower)) == ["turn.failed"]
            assert [kind for kind in kinds(await rest_of(tab)) if kind not in TERMINAL] == []
        spoken.end("Again")
        assert kinds(await rest_of(stream))[-1] == "turn.failed"
    for pod in pods:
        for gone in (first[0].data["turn_id"], turn_id):
            path = f"/api/chat/shop/turns/{gone}/stream?session_id={session_id}"
            problem(await pod.client.get(path), 404, "session_not_found")
    left = [key for key in await all_keys(stores.client, stores.keys) if ":events:" in key]
    assert left == [], "what an erased session has streamed is still in Redis"


async def test_the_logs_of_a_session_that_left_redis_and_came_back_are_erased_too(
    pods: Pods, spoken: Spoken, session_id: str, stores: Stores, flush: Callable[[], Awaitable[None]]
) -> None:
    await spoken_turn(pods[0], spoken, session_id, "Hello", "a secret")
    await flush()
    assert await stores.client.delete(stores.keys.session(session_id)) == 1
    await spoken_turn(pods[1], spoken, session_id, "Again", "another secret")
    assert (await pods[1].client.delete(f"/api/sessions/{session_id}")).status_code == 204
    assert [key for key in await all_keys(stores.client, stores.keys) if ":events:" in key] == []
    assert await stores.client.hlen(stores.keys.logs(0)) == 0


async def test_the_note_of_a_log_is_trimmed_when_the_log_has_expired(
    pods: Pods, spoken: Spoken, session_id: str, stores: Stores, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    await spoken_turn(pods[0], spoken, session_id, "Hello", "Hi")
    await worker._housekeeping.trim()
    assert await stores.client.hexists(stores.keys.logs(0), session_id)
    monkeypatch.setattr(logs, "LOG_TTL_MS", 1)
    await spoken_turn(pods[0], spoken, session_id, "Again", "Hi")
    # The log of the first turn is still there.
    await worker._housekeeping.trim()
    noted = await stores.client.hget(stores.keys.logs(0), session_id)
    assert noted is not None and len(noted.split()) == 2
    await stores.client.hset(stores.keys.logs(0), session_id, noted.split()[-1])
    await worker._housekeeping.trim()
    assert await stores.client.hlen(stores.keys.logs(0)) == 0


# --------------------------------------------------------------------------------------------------------------- wake-ups


async def test_wakeups_take_one_connection_however_the_first_subscriptions_fall(settings: Settings, stores: Stores) -> None:
    """A subscription that falls into the moment in which the connection is made is heard, and so are the others."""
    heard: list[str] = []
    others = len(await pubsub_connections(stores))
    for moment in range(40):
        # Without a connection in its pool: making one takes a while.
        client = connect(settings.redis_url)
        wakeups = WakeUps(client, stores.keys)
        running = asyncio.create_task(wakeups.run(heard.append))
        for _ in range(moment):
            await asyncio.sleep(0)
        await wakeups.subscribe("gw:test", heard.append)
        heard.clear()

        async def both(moment: int = moment) -> bool:
            for channel in (stores.keys.control, "gw:test"):
                await stores.client.publish(channel, f"{channel} {moment}")
            return {f"{stores.keys.control} {moment}", f"gw:test {moment}"} <= set(heard)

        await wait_for(both, f"both channels are heard, when subscribed at moment {moment}", 5)
        assert len(await pubsub_connections(stores)) == others + 1
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)

        async def closed() -> bool:
            return len(await pubsub_connections(stores)) == others

        await wait_for(closed, "the connection is closed")
        await client.aclose()


async def pubsub_connections(stores: Stores) -> list[bytes]:
    found: bytes = await stores.client.execute_command("CLIENT", "LIST", "TYPE", "PUBSUB")
    return found.splitlines()


async def test_control_without_wakeups_a_follower_has_to_look_again(
    pods: Pods, spoken: Spoken, session_id: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is lost with the wake-ups, it only takes longer."""
    monkeypatch.setattr(follow, "LOOK_AGAIN_S", 0.05)

    async def deaf(channel: str, callback: Callable[[str], None]) -> None:
        pods[1].pod.wakeups._callbacks.setdefault(channel, []).append(lambda _: None)

    async def forget(channel: str, callback: Callable[[str], None]) -> None:
        pods[1].pod.wakeups._callbacks.pop(channel, None)

    monkeypatch.setattr(pods[1].pod.wakeups, "subscribe", deaf)
    monkeypatch.setattr(pods[1].pod.wakeups, "unsubscribe", forget)
    async with speak(pods[0].client, session_id, "Hello") as stream:
        turn_id = (await stream.take(1))[0].data["turn_id"]
        async with resume(pods[1].client, session_id, turn_id) as follower:
            spoken.say("Hello", "one ")
            spoken.end("Hello")
            await rest_of(stream)
            assert await rest_of(follower) == stream.events
