"""What a log may hold, in memory and in Redis, and what slow and late readers get."""

from tests.streams.steps import Pods, rest_of
from tests.support.spoken import Spoken, stored_events
from tests.support.sse import check_whole, kinds, resume, speak, text_of


async def test_a_log_is_bounded_and_a_late_reader_is_told(pods: Pods, spoken: Spoken, session_id: str) -> None:
    for pod in pods:
        pod.tune(max_events=20, coalesce_s=0.001)
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


async def test_what_was_dropped_before_redis_had_it_is_no_silent_gap(pods: Pods, spoken: Spoken, session_id: str) -> None:
    """A burst beyond the bound, faster than Redis is written to."""
    for pod in pods:
        pod.tune(max_events=20, coalesce_s=0.3)
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


async def test_a_log_is_bounded_in_bytes(pods: Pods, spoken: Spoken, session_id: str) -> None:
    for pod in pods:
        pod.tune(max_bytes=10_000, coalesce_s=0.001)
    async with speak(pods[0].client, session_id, "Hello") as stream:
        turn_id = (await stream.take(1))[0].data["turn_id"]
        for n in range(60):
            spoken.say("Hello", f"{n}".ljust(1000, "."))
            await stream.take(1)
        spoken.say("Hello", "x" * 30_000)
        spoken.say("Hello", "last")
        await stream.take(2)
        log = pods[0].pod.streams.own[turn_id]
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


async def test_a_slow_reader_slows_nobody_and_holds_no_memory(pods: Pods, spoken: Spoken, session_id: str) -> None:
    for pod in pods:
        pod.tune(max_bytes=100_000)
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
