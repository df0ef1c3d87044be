"""Steps that the tests of streams share."""

import asyncio
from typing import Any

import httpx

from gateway.app import Stores
from tests.support.spoken import Spoken, SpokenPod
from tests.support.sse import Event, Stream, speak

Pods = tuple[SpokenPod, SpokenPod]
SHOP = {"Origin": "https://shop.example"}


def problem(answer: httpx.Response, status: int, code: str) -> dict[str, Any]:
    """Checks that an answer is that problem; its document."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    document: dict[str, Any] = answer.json()
    assert document["code"] == code, document
    return document


async def spoken_turn(pod: SpokenPod, spoken: Spoken, session_id: str, message: str, *pieces: str) -> list[Event]:
    """A whole streamed turn; its events."""
    spoken.say(message, *pieces)
    spoken.end(message)
    async with speak(pod.client, session_id, message) as stream:
        return await rest_of(stream)


async def rest_of(stream: Stream) -> list[Event]:
    """All events up to the end of a stream that must come to one."""
    return await asyncio.wait_for(stream.rest(), 20)


async def waiting(stores: Stores, session_id: str) -> list[str]:
    """The turns that wait, in order."""
    field = await stores.client.execute_command("HGET", stores.keys.session(session_id), "waiting") or b""
    return [waiter.split("@")[0] for waiter in field.decode().split()]
