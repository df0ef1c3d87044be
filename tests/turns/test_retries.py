"""A message that is sent again is answered once: by message id, over pods, evictions and failures."""

import asyncio

import pytest

from gateway.app import Stores
from tests.conftest import PutAgent
from tests.support.pods import ServedPod
from tests.turns.conftest import SESSION_ID, Flush, Rows, outcome, stored


async def opened(pod: ServedPod) -> None:
    """Opens the session."""
    answer = await pod.client.post("/api/sessions", json={"agent_id": "shop", "session_id": SESSION_ID})
    assert answer.status_code == 201, answer.text


async def test_a_retry_gets_the_stored_answer_and_the_graph_runs_once(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent(graph="gated")
    pod_a.gated.open()
    first = await pod_a.ask("Hello", SESSION_ID, message_id="m1")
    again = await pod_b.ask("Hello", SESSION_ID, message_id="m1")
    assert first.json()["metadata"]["replayed"] is False
    assert again.status_code == 200
    assert again.json()["response"] == first.json()["response"]
    assert again.json()["metadata"] == first.json()["metadata"] | {"replayed": True}
    assert (pod_a.gated.started, pod_b.gated.started) == (["Hello"], [])
    await flush()
    assert await stored(rows) == ["Hello", "Answer to Hello"]


async def test_without_a_message_id_the_same_text_is_another_message(pod_a: ServedPod, put_agent: PutAgent) -> None:
    await put_agent(graph="gated")
    pod_a.gated.open()
    await pod_a.ask("Hello", SESSION_ID)
    assert (await pod_a.ask("Hello", SESSION_ID)).json()["metadata"]["replayed"] is False
    assert pod_a.gated.started == ["Hello", "Hello"]


async def test_a_message_id_counts_within_its_session(pod_a: ServedPod, put_agent: PutAgent) -> None:
    await put_agent(graph="gated")
    pod_a.gated.open()
    await pod_a.ask("Hello", SESSION_ID, message_id="m1")
    other = await pod_a.ask("Goodbye", f"{SESSION_ID}_other", message_id="m1")
    assert outcome(other) == (200, "Answer to Goodbye")


async def test_a_message_id_in_the_visitors_metadata_is_no_message_id(pod_a: ServedPod, put_agent: PutAgent) -> None:
    await put_agent(graph="gated")
    pod_a.gated.open()
    await pod_a.ask("Hello", SESSION_ID, message_id="m1", metadata={"message_id": "m2", "text": '"message_id":"m2"'})
    assert outcome(await pod_a.ask("Goodbye", SESSION_ID, message_id="m2")) == (200, "Answer to Goodbye")


async def test_a_retry_after_eviction_gets_the_answer_that_postgres_has(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, stores: Stores, flush: Flush, rows: Rows
) -> None:
    await put_agent(graph="gated")
    pod_a.gated.open()
    first = await pod_a.ask("Hello", SESSION_ID, message_id="m1")
    await flush()
    await stores.client.delete(stores.keys.session(SESSION_ID))
    again = await pod_b.ask("Hello", SESSION_ID, message_id="m1")
    assert again.json()["response"] == first.json()["response"]
    assert again.json()["metadata"] == first.json()["metadata"] | {"replayed": True}
    assert (pod_a.gated.started, pod_b.gated.started) == (["Hello"], [])
    await flush()
    assert await stored(rows) == ["Hello", "Answer to Hello"]


async def test_a_retry_after_the_next_message_is_not_run_again_however_short_the_history_window(
    pod_a: ServedPod, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent(graph="gated", history_window=0)
    pod_a.gated.open()
    first = await pod_a.ask("One", SESSION_ID, message_id="m1")
    await flush()
    await pod_a.ask("Two", SESSION_ID, message_id="m2")
    again = await pod_a.ask("One", SESSION_ID, message_id="m1")
    assert pod_a.gated.started == ["One", "Two"]
    assert again.json()["metadata"] == first.json()["metadata"] | {"replayed": True}
    await flush()
    assert await stored(rows) == ["One", "Answer to One", "Two", "Answer to Two"]


@pytest.mark.parametrize("evicted", [False, True], ids=["hot", "evicted"])
async def test_a_message_id_cannot_be_used_for_another_text(
    pod_a: ServedPod, put_agent: PutAgent, stores: Stores, flush: Flush, evicted: bool
) -> None:
    await put_agent(graph="gated")
    pod_a.gated.open()
    await pod_a.ask("Hello", SESSION_ID, message_id="m1")
    if evicted:
        await flush()
        await stores.client.delete(stores.keys.session(SESSION_ID))
    other = await pod_a.ask("Goodbye", SESSION_ID, message_id="m1")
    assert outcome(other) == (422, "message_id_reused")
    assert pod_a.gated.started == ["Hello"]


@pytest.mark.parametrize("if_busy", ["queue", "reject", "interrupt"])
async def test_a_retry_while_the_first_still_runs_waits_and_gets_the_same_answer(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, flush: Flush, rows: Rows, if_busy: str
) -> None:
    await put_agent(graph="gated", if_busy=if_busy)
    first = pod_a.send("Hello", SESSION_ID, message_id="m1")
    await pod_a.gated.has_started("Hello")
    again = pod_b.send("Hello", SESSION_ID, message_id="m1")
    await pod_b.has_asked()
    pod_a.gated.let_go("Hello")
    assert (await first).json()["metadata"]["replayed"] is False
    assert (await again).json()["metadata"] == (await first).json()["metadata"] | {"replayed": True}
    assert (await again).json()["response"] == "Answer to Hello"
    assert pod_b.gated.started == []
    await flush()
    assert await stored(rows) == ["Hello", "Answer to Hello"]


async def test_many_retries_at_once_get_one_answer(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent(graph="gated")
    pod_a.gated.open()
    pod_b.gated.open()
    await opened(pod_a)
    sent = [pod.send("Hello", SESSION_ID, message_id="m1") for pod in (pod_a, pod_b) * 8]
    answers = [(await one).json() for one in sent]
    assert {answer["response"] for answer in answers} == {"Answer to Hello"}
    assert len({answer["metadata"]["turn_id"] for answer in answers}) == 1
    assert len(pod_a.gated.started + pod_b.gated.started) == 1
    await flush()
    assert await stored(rows) == ["Hello", "Answer to Hello"]


@pytest.mark.parametrize("count", [2, 16])
async def test_a_first_message_sent_many_times_at_once_gets_one_answer(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, count: int
) -> None:
    await put_agent(graph="gated")
    pod_a.gated.open()
    pod_b.gated.open()
    for session in range(4):
        session_id = f"{SESSION_ID}_{session}"
        sent = [(pod_a, pod_b)[number % 2].send("Hello", session_id, message_id="m1") for number in range(count)]
        assert [outcome(await one) for one in sent] == [(200, "Answer to Hello")] * count


async def test_a_returning_visitor_may_ask_for_everything_at_once(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, stores: Stores, flush: Flush
) -> None:
    await put_agent(graph="gated")
    pod_a.gated.open()
    pod_b.gated.open()
    await pod_a.ask("Hello", SESSION_ID)
    await flush()
    await stores.client.delete(stores.keys.session(SESSION_ID))
    reads = [pod.client.get(f"/api/sessions/{SESSION_ID}/messages") for pod in (pod_a, pod_b) * 8]
    answers = await asyncio.gather(pod_b.ask("I am back", SESSION_ID), *reads)
    assert [answer.status_code for answer in answers] == [200] * 17
    assert answers[0].json()["metadata"]["history"] == 2


async def test_a_retry_of_a_failed_turn_runs_it_again(pod_a: ServedPod, put_agent: PutAgent) -> None:
    await put_agent(graph="gated")
    pod_a.gated.open()
    pod_a.gated.failing.add("Hello")
    assert outcome(await pod_a.ask("Hello", SESSION_ID, message_id="m1")) == (502, "graph_failed")
    pod_a.gated.failing.clear()
    assert outcome(await pod_a.ask("Hello", SESSION_ID, message_id="m1")) == (200, "Answer to Hello")


async def test_a_retry_that_waits_for_a_turn_that_fails_runs_it_itself(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent
) -> None:
    await put_agent(graph="gated")
    pod_a.gated.failing.add("Hello")
    first = pod_a.send("Hello", SESSION_ID, message_id="m1")
    await pod_a.gated.has_started("Hello")
    again = pod_b.send("Hello", SESSION_ID, message_id="m1")
    await pod_b.has_asked()
    pod_b.gated.open()
    pod_a.gated.open()
    assert outcome(await first) == (502, "graph_failed")
    assert outcome(await again) == (200, "Answer to Hello")


async def test_a_retry_after_the_session_has_ended_still_gets_its_answer(pod_a: ServedPod, put_agent: PutAgent) -> None:
    await put_agent(graph="gated")
    pod_a.gated.open()
    await pod_a.ask("Hello", SESSION_ID, message_id="m1")
    await pod_a.client.post(f"/api/sessions/{SESSION_ID}/end")
    assert outcome(await pod_a.ask("Hello", SESSION_ID, message_id="m1")) == (200, "Answer to Hello")
    assert outcome(await pod_a.ask("Hello again", SESSION_ID, message_id="m2")) == (410, "session_ended")
