"""Streams that are resumed, on the pod that runs the turn and on others: cursors and resets."""

import pytest

from gateway.app import Stores
from tests.streams.steps import Pods, problem, rest_of, spoken_turn
from tests.support.spoken import Spoken
from tests.support.sse import check_whole, kinds, resume, speak, text_of


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
