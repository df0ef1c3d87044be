"""Wake-ups: one connection, and what a lost one costs."""

import asyncio
from collections.abc import Callable

import pytest

from gateway.app import Stores
from gateway.settings import Settings
from persistence.redis.connection import connect
from persistence.redis.wakeups import WakeUps
from tests.streams.steps import Pods, rest_of
from tests.support.serving import wait_for
from tests.support.spoken import Spoken
from tests.support.sse import resume, speak


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
    for pod in pods:
        pod.tune(poll_s=0.05)

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
