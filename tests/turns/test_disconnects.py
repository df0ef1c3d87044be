"""Visitors who leave before their answer."""

import asyncio

import httpx

from gateway.app import Stores
from tests.conftest import PutAgent
from tests.support.pods import ServedPod
from tests.support.serving import wait_for
from tests.turns.conftest import SESSION_ID, Flush, Rows, stored, waiting


async def test_a_visitor_who_leaves_in_mid_turn_ends_no_turn(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent(graph="gated")
    async with httpx.AsyncClient(base_url=pod_a.client.base_url) as leaving:
        body = {"message": "Hello", "session_id": SESSION_ID, "message_id": "m1"}
        left = asyncio.create_task(leaving.post("/api/chat/shop/message", json=body))
        await pod_a.gated.has_started("Hello")
        left.cancel()
        await asyncio.wait({left})
    pod_a.gated.open()

    async def is_answered() -> bool:
        return await pod_b.transcript(SESSION_ID) == ["Hello", "Answer to Hello"]

    await wait_for(is_answered, "the answer is stored")
    again = await pod_b.ask("Hello", SESSION_ID, message_id="m1")
    assert again.json()["metadata"]["replayed"] is True
    assert (pod_a.gated.started, pod_a.gated.cancelled) == (["Hello"], [])
    await flush()
    assert await stored(rows) == ["Hello", "Answer to Hello"]


async def test_a_visitor_who_leaves_while_waiting_is_answered_in_turn(
    pod_a: ServedPod, put_agent: PutAgent, stores: Stores
) -> None:
    await put_agent(graph="gated")
    first = pod_a.send("One", SESSION_ID)
    await pod_a.gated.has_started("One")
    second = pod_a.send("Two", SESSION_ID)
    await waiting(stores, 1)
    second.cancel()
    await asyncio.wait({second})
    pod_a.gated.open()
    assert (await first).status_code == 200

    async def is_answered() -> bool:
        return await pod_a.transcript(SESSION_ID) == ["One", "Answer to One", "Two", "Answer to Two"]

    await wait_for(is_answered, "the second answer is stored")
