"""The feed of a session: the second tab, its cursors, its ends."""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import pytest

from gateway.app import Stores
from gateway.streams.events import TERMINAL, TurnStarted
from gateway.streams.log import TurnWriter
from persistence.model.agents import TurnPolicy
from persistence.model.session import Access
from persistence.redis import log_entries as logs
from persistence.redis.outcomes import Begun
from persistence.worker import Worker
from tests.streams.steps import SHOP, Pods, problem, rest_of, spoken_turn
from tests.support.rule import all_keys
from tests.support.serving import wait_for
from tests.support.spoken import Spoken, SpokenPod, stored_events
from tests.support.sse import kinds, resume, speak, text_of, watch


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
    writer = TurnWriter(stores.turn_logs, session_id, turn_id, fence)
    writer.emit(TurnStarted(turn_id, session_id))
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
    pods: Pods, spoken: Spoken, session_id: str, stores: Stores
) -> None:
    for pod in pods:
        pod.tune(poll_s=0.1, heartbeat_s=0.2)
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
    await worker.housekeeping.trim()
    assert await stores.client.hexists(stores.keys.logs(0), session_id)
    monkeypatch.setattr(logs, "LOG_TTL_MS", 1)
    await spoken_turn(pods[0], spoken, session_id, "Again", "Hi")
    # The log of the first turn is still there.
    await worker.housekeeping.trim()
    noted = await stores.client.hget(stores.keys.logs(0), session_id)
    assert noted is not None and len(noted.split()) == 2
    await stores.client.hset(stores.keys.logs(0), session_id, noted.split()[-1])
    await worker.housekeeping.trim()
    assert await stores.client.hlen(stores.keys.logs(0)) == 0
