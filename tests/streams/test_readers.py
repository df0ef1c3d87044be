"""The readers of a stream: heartbeats, readers that leave, many readers of one turn."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack

from gateway.app import Stores
from gateway.streams.events import Batch, Item
from persistence.model.session import Access
from tests.streams.steps import Pods, rest_of
from tests.support.serving import wait_for
from tests.support.spoken import Spoken, stored_events
from tests.support.sse import kinds, resume, speak, text_of, watch


async def test_heartbeats_keep_idle_streams_open(pods: Pods, spoken: Spoken, session_id: str) -> None:
    for pod in pods:
        pod.tune(heartbeat_s=0.05)
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
            assert len(pods[1].pod.streams.follower.turns) == 1
    await wait_for(lambda: not pods[1].wakeups and not pods[1].pod.streams.follower.turns, "the readers are forgotten")
    spoken.end("Hello")
    await wait_for(lambda: not pods[0].pod.streams.own, "the turn is forgotten")


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
        read = [event async for item in limited(second) if isinstance(item, Batch) for event in item.events]
        assert read[-1].kind == "turn.completed"
        del never_read
    await wait_for(lambda: not there.follower.turns and not pods[1].wakeups, "nothing is left behind")


async def limited(items: AsyncIterator[Item]) -> AsyncIterator[Item]:
    """What comes to its end within the time of a test."""
    async with asyncio.timeout(20):
        async for item in items:
            yield item


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
