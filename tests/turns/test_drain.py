"""The end of a pod: its turns end, or let their sessions go."""

import asyncio
from pathlib import Path
from time import monotonic

import httpx

from gateway.app import Stores
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.support.pods import ServedPod, fields_of, gateway_process
from tests.support.serving import wait_for
from tests.turns.conftest import SESSION_ID, Flush, Rows, outcome, stored


async def test_a_pod_that_drains_ends_its_turns_and_takes_no_new_ones(pod_a: ServedPod, put_agent: PutAgent) -> None:
    await put_agent(graph="gated")
    running = pod_a.send("Running", SESSION_ID)
    await pod_a.gated.has_started("Running")
    draining = asyncio.create_task(pod_a.pod.turns.drain(30))
    await asyncio.sleep(0)
    refused = await pod_a.ask("New", f"{SESSION_ID}_other")
    assert outcome(refused) == (503, "draining")
    assert int(refused.headers["retry-after"]) >= 1
    assert not draining.done()
    pod_a.gated.open()
    assert outcome(await running) == (200, "Answer to Running")
    await draining


async def test_a_turn_that_outlasts_the_drain_lets_its_session_go(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, stores: Stores
) -> None:
    await put_agent(graph="gated")
    pod_b.gated.open()
    await pod_b.ask("Before", SESSION_ID)
    before = await fields_of(stores, SESSION_ID)
    running = pod_a.send("Running", SESSION_ID)
    await pod_a.gated.has_started("Running")
    await pod_a.pod.turns.drain(0.1)
    assert await fields_of(stores, SESSION_ID) == before
    assert outcome(await running) == (503, "draining")
    assert outcome(await pod_b.ask("After", SESSION_ID, if_busy="reject")) == (200, "Answer to After")


async def turn_runs(stores: Stores) -> None:
    async def it_does() -> bool:
        return bool((await fields_of(stores, SESSION_ID)).get("turn"))

    await wait_for(it_does, "a turn runs")


async def test_sigterm_in_mid_turn_lets_the_turn_end_and_the_answer_arrive(
    settings: Settings, stores: Stores, put_agent: PutAgent, tmp_path: Path, flush: Flush, rows: Rows
) -> None:
    await put_agent(config={"delay_ms": 1500})
    async with (
        gateway_process("serve", settings, tmp_path) as process,
        httpx.AsyncClient(base_url=process.url, timeout=30) as client,
    ):
        body = {"message": "Hello", "session_id": SESSION_ID}
        sent = asyncio.create_task(client.post("/api/chat/shop/message", json=body))
        await turn_runs(stores)
        status = await asyncio.to_thread(process.stop)
        assert outcome(await sent) == (200, "You said: Hello")
        assert status == 0
        assert '"turn.completed"' in process.output()
    await flush()
    assert await stored(rows) == ["Hello", "You said: Hello"]


async def test_a_pod_ends_within_its_drain_time_and_leaves_the_session_free(
    settings: Settings, stores: Stores, put_agent: PutAgent, tmp_path: Path, pod_a: ServedPod
) -> None:
    await put_agent(config={"delay_ms": 60_000})
    drain_s = 3
    async with (
        gateway_process("serve", settings, tmp_path, GATEWAY_DRAIN_S=str(drain_s)) as process,
        httpx.AsyncClient(base_url=process.url, timeout=30) as client,
    ):
        body = {"message": "Hello", "session_id": SESSION_ID}
        sent = asyncio.create_task(client.post("/api/chat/shop/message", json=body))
        await turn_runs(stores)
        began = monotonic()
        assert await asyncio.to_thread(process.stop) == 0
        took_s = monotonic() - began
        await asyncio.wait({sent})
    assert (await fields_of(stores, SESSION_ID))["turn"] == ""
    await put_agent(config={})
    assert outcome(await pod_a.ask("Hello", SESSION_ID, if_busy="reject")) == (200, "You said: Hello")
    assert took_s < 2 * drain_s, f"ended after {took_s:.1f} s"
    # Whether it is an answer at all: a connection that is cut tells the visitor nothing.
    assert outcome(sent.result()) == (503, "draining")
