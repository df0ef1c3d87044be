"""A turn from begin to commit: retries, double texting, leases, disconnects and the end of a pod."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import pytest

from gateway.app import Stores
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.support.pods import ServedPod, fields_of, gated_pod, gateway_process, plain_logs, rewrite
from tests.support.serving import wait_for

SESSION_ID = "session_1234567890_abc123xyz"
Rows = Callable[..., Awaitable[list[Any]]]
Flush = Callable[[], Awaitable[None]]
StartPod = Callable[..., Awaitable[ServedPod]]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with plain_logs():
        yield


@pytest.fixture
async def start_pod(settings: Settings, stores: Stores) -> AsyncIterator[StartPod]:
    """Starts another pod on the same stores: `await start_pod(lease_s=1)`."""
    async with AsyncExitStack() as stack:

        async def start(**changes: Any) -> ServedPod:
            return await stack.enter_async_context(gated_pod(settings, **changes))

        yield start


@pytest.fixture
async def pod_a(start_pod: StartPod) -> ServedPod:
    return await start_pod()


@pytest.fixture
async def pod_b(start_pod: StartPod) -> ServedPod:
    return await start_pod()


async def stored(rows: Rows) -> list[str]:
    """The contents of all messages in Postgres, in order."""
    return [row[0] for row in await rows("SELECT content FROM agent_messages ORDER BY session_id, seq")]


def outcome(response: httpx.Response) -> tuple[int, str]:
    """The status, and the answer or the error's code."""
    body = response.json()
    return response.status_code, body.get("response") or body["code"]


async def opened(pod: ServedPod) -> None:
    """Opens the session."""
    answer = await pod.client.post("/api/sessions", json={"agent_id": "shop", "session_id": SESSION_ID})
    assert answer.status_code == 201, answer.text


async def waiting(stores: Stores, count: int) -> None:
    """Waits until so many messages wait for the session."""

    async def so_many() -> bool:
        return len((await fields_of(stores, SESSION_ID))["waiting"].split()) == count

    await wait_for(so_many, f"{count} messages wait")


async def lease_over(stores: Stores, lease_until: str) -> None:
    """Waits until Redis' clock has passed a moment that the session hash names."""

    async def is_over() -> bool:
        seconds, microseconds = await stores.client.execute_command("TIME")
        return bool(int(seconds) + int(microseconds) / 1e6 > datetime.fromisoformat(lease_until).timestamp())

    await wait_for(is_over, "the lease runs out")


# -------------------------------------------------------------------------------------------------------------- retries


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


# -------------------------------------------------------------------------------------------------------- double texting


async def test_messages_queue_in_order_of_arrival_over_two_pods_and_the_fourth_is_refused(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, stores: Stores
) -> None:
    await put_agent(graph="gated")
    sent = [pod_a.send("One", SESSION_ID)]
    await pod_a.gated.has_started("One")
    for number, (pod, message) in enumerate([(pod_b, "Two"), (pod_a, "Three"), (pod_b, "Four")], 1):
        sent.append(pod.send(message, SESSION_ID))
        await waiting(stores, number)

    full = await pod_a.ask("Five", SESSION_ID)
    assert outcome(full) == (429, "queue_full")
    assert int(full.headers["retry-after"]) == full.json()["retry_after"] >= 1

    pod_a.gated.open()
    pod_b.gated.open()
    answers = [await one for one in sent]
    assert [outcome(answer) for answer in answers] == [
        (200, f"Answer to {message}") for message in ("One", "Two", "Three", "Four")
    ]
    assert [answer.json()["metadata"]["history"] for answer in answers] == [0, 2, 4, 6]
    assert (await pod_b.transcript(SESSION_ID))[::2] == ["One", "Two", "Three", "Four"]
    assert (await fields_of(stores, SESSION_ID))["waiting"] == ""


async def test_a_place_in_the_queue_that_is_given_up_is_free_again(
    start_pod: StartPod, put_agent: PutAgent, stores: Stores
) -> None:
    await put_agent(graph="gated")
    patient, hasty = await start_pod(), await start_pod(queue_wait_s=0.3)
    first = patient.send("One", SESSION_ID)
    await patient.gated.has_started("One")
    answers = await asyncio.gather(*(hasty.ask(f"Hasty {number}", SESSION_ID) for number in range(3)))
    assert {outcome(answer) for answer in answers} == {(409, "turn_in_progress")}
    assert (await fields_of(stores, SESSION_ID))["waiting"] == ""
    patient.gated.open()
    assert outcome(await first) == (200, "Answer to One")
    assert await patient.transcript(SESSION_ID) == ["One", "Answer to One"]


async def test_a_newcomer_does_not_overtake_one_who_waits(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, stores: Stores
) -> None:
    await put_agent(graph="gated")
    first = pod_a.send("One", SESSION_ID)
    await pod_a.gated.has_started("One")
    second = pod_b.send("Two", SESSION_ID)
    await waiting(stores, 1)
    pod_a.gated.let_go("One", "Three")
    assert (await first).status_code == 200
    third = pod_a.send("Three", SESSION_ID)
    await pod_b.gated.has_started("Two")
    assert pod_a.gated.started == ["One"]
    pod_b.gated.let_go("Two")
    assert [outcome(await one)[0] for one in (second, third)] == [200, 200]
    assert (await pod_a.transcript(SESSION_ID))[::2] == ["One", "Two", "Three"]


async def test_of_many_messages_at_once_reject_lets_one_through(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent
) -> None:
    await put_agent(graph="gated", if_busy="reject")
    await opened(pod_a)
    sent = [pod.send(f"Message {number}", SESSION_ID) for number, pod in enumerate((pod_a, pod_b) * 4)]
    await asyncio.wait(sent, return_when=asyncio.FIRST_COMPLETED)
    await wait_for(lambda: sum(one.done() for one in sent) == len(sent) - 1, "all but one are refused")
    pod_a.gated.open()
    pod_b.gated.open()
    answers = [await one for one in sent]
    assert sorted(answer.status_code for answer in answers) == [200] + [409] * 7
    refused = [answer for answer in answers if answer.status_code == 409]
    assert {answer.json()["code"] for answer in refused} == {"turn_in_progress"}
    assert all(int(answer.headers["retry-after"]) >= 1 for answer in refused)
    assert len(pod_a.gated.started + pod_b.gated.started) == 1
    assert len(await pod_a.transcript(SESSION_ID)) == 2


async def test_an_interrupting_message_ends_the_turn_on_the_other_pod_and_is_answered(
    start_pod: StartPod, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent(graph="gated", if_busy="interrupt")
    pod_a, pod_b = await start_pod(lease_s=1), await start_pod(lease_s=1)
    old = pod_a.send("Old", SESSION_ID)
    await pod_a.gated.has_started("Old")
    pod_b.gated.open()
    new = await pod_b.ask("New", SESSION_ID)
    assert outcome(new) == (200, "Answer to New")
    assert new.json()["metadata"]["history"] == 0
    # The old graph is stopped by itself: nobody lets it go.
    assert outcome(await old) == (409, "turn_cancelled")
    assert pod_a.gated.cancelled == ["Old"]
    assert await pod_a.transcript(SESSION_ID) == ["New", "Answer to New"]
    await flush()
    assert await stored(rows) == ["New", "Answer to New"]


async def test_an_interrupted_turn_that_ends_before_it_knows_commits_nothing(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent(graph="gated", if_busy="interrupt")
    old = pod_a.send("Old", SESSION_ID)
    await pod_a.gated.has_started("Old")
    new = pod_b.send("New", SESSION_ID)
    await pod_b.gated.has_started("New")
    pod_a.gated.open()
    assert outcome(await old) in ((409, "turn_cancelled"), (409, "turn_superseded"))
    pod_b.gated.open()
    assert outcome(await new) == (200, "Answer to New")
    await flush()
    assert await stored(rows) == ["New", "Answer to New"]


async def test_an_interrupted_graph_that_raises_when_cancelled_is_told_as_interrupted(
    start_pod: StartPod, put_agent: PutAgent
) -> None:
    await put_agent(graph="gated", if_busy="interrupt")
    pod_a, pod_b = await start_pod(lease_s=1), await start_pod(lease_s=1)
    pod_a.gated.failing_when_cancelled.add("Old")
    old = pod_a.send("Old", SESSION_ID)
    await pod_a.gated.has_started("Old")
    pod_b.gated.open()
    assert outcome(await pod_b.ask("New", SESSION_ID)) == (200, "Answer to New")
    assert outcome(await old) == (409, "turn_cancelled")


async def test_if_busy_of_a_message_goes_before_the_agents(pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent) -> None:
    await put_agent(graph="gated", if_busy="queue")
    old = pod_a.send("Old", SESSION_ID)
    await pod_a.gated.has_started("Old")
    assert outcome(await pod_b.ask("Rejected", SESSION_ID, if_busy="reject")) == (409, "turn_in_progress")
    pod_b.gated.open()
    assert outcome(await pod_b.ask("New", SESSION_ID, if_busy="interrupt")) == (200, "Answer to New")
    pod_a.gated.open()
    assert outcome(await old) == (409, "turn_cancelled")


async def test_two_sessions_do_not_wait_for_each_other(pod_a: ServedPod, put_agent: PutAgent) -> None:
    await put_agent(graph="gated")
    first = pod_a.send("One", SESSION_ID)
    await pod_a.gated.has_started("One")
    pod_a.gated.let_go("Other")
    assert outcome(await pod_a.ask("Other", f"{SESSION_ID}_other")) == (200, "Answer to Other")
    assert not first.done()
    pod_a.gated.open()
    assert (await first).status_code == 200


# ------------------------------------------------------------------------------------------------------------ rate limits


async def test_a_session_has_its_rate_limit_over_all_pods(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, stores: Stores
) -> None:
    await put_agent(graph="echo", rate_limit={"messages": 2, "per_s": 3600})
    assert (await pod_a.ask("One", SESSION_ID, message_id="m1")).status_code == 200
    assert (await pod_b.ask("Two", SESSION_ID)).status_code == 200
    before = await fields_of(stores, SESSION_ID)

    limited = await pod_a.ask("Three", SESSION_ID)

    assert outcome(limited) == (429, "rate_limited")
    assert limited.json()["retryable"] is True
    # Half an hour a message: of the burst of two nothing is left.
    assert 1700 <= int(limited.headers["retry-after"]) == limited.json()["retry_after"] <= 1800
    assert await fields_of(stores, SESSION_ID) == before
    assert (await pod_b.ask("Hello", f"{SESSION_ID}_other")).status_code == 200
    # A retry of what was answered costs nothing.
    assert (await pod_b.ask("One", SESSION_ID, message_id="m1")).status_code == 200


async def test_after_the_time_that_retry_after_names_a_message_gets_through(pod_a: ServedPod, put_agent: PutAgent) -> None:
    await put_agent(graph="echo", rate_limit={"messages": 1, "per_s": 1})
    assert (await pod_a.ask("One", SESSION_ID)).status_code == 200

    async def gets_through() -> bool:
        return (await pod_a.ask("Two", SESSION_ID)).status_code == 200

    assert (await pod_a.ask("Two", SESSION_ID)).headers["retry-after"] == "1"
    await wait_for(gets_through, "the limit lets a message through")


async def test_a_message_that_waited_and_is_then_over_the_limit_leaves_the_queue(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, stores: Stores
) -> None:
    await put_agent(graph="gated", rate_limit={"messages": 1, "per_s": 3600})
    first = pod_a.send("One", SESSION_ID)
    await pod_a.gated.has_started("One")
    second = pod_b.send("Two", SESSION_ID)
    await waiting(stores, 1)
    pod_a.gated.open()
    assert (await first).status_code == 200
    assert outcome(await second) == (429, "rate_limited")
    assert (await fields_of(stores, SESSION_ID))["waiting"] == ""


# ------------------------------------------------------------------------------------------------------------ disconnects


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


# ----------------------------------------------------------------------------------------------------------------- leases


async def forgotten(*_: Any) -> bool:
    """What a pod that sleeps believes of its lease: that it renews it."""
    return True


async def taken_over(
    late: ServedPod, other: ServedPod, monkeypatch: pytest.MonkeyPatch
) -> tuple[httpx.Response, httpx.Response]:
    """Lets a turn lose its lease to one on another pod, and wake up after that one is answered; both responses."""
    monkeypatch.setattr(late.stores.sessions, "renew", forgotten)
    first = late.send("Late", SESSION_ID)
    await late.gated.has_started("Late")
    other.gated.open()
    second = await other.ask("Other", SESSION_ID)
    assert not first.done()
    late.gated.open()
    return await first, second


async def test_a_turn_that_lost_its_lease_never_commits(
    start_pod: StartPod, put_agent: PutAgent, stores: Stores, flush: Flush, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put_agent(graph="gated")
    late, other = await start_pod(lease_s=1), await start_pod(lease_s=1)
    first, second = await taken_over(late, other, monkeypatch)
    assert outcome(second) == (200, "Answer to Other")
    assert outcome(first) == (409, "turn_superseded")
    assert (await fields_of(stores, SESSION_ID))["turns"] == "1"
    await flush()
    assert await stored(rows) == ["Other", "Answer to Other"]


async def test_control_without_the_fence_the_late_turn_commits(
    start_pod: StartPod, put_agent: PutAgent, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put_agent(graph="gated")
    late, other = await start_pod(lease_s=1), await start_pod(lease_s=1)
    guard = "if turn_id ~= args.turn_id or fence ~= args.fence then"
    rewrite(late.stores.scripts, "commit", lambda text: text.replace(guard, "if false then"))
    first, second = await taken_over(late, other, monkeypatch)
    assert outcome(second) == (200, "Answer to Other")
    assert outcome(first) == (200, "Answer to Late")
    # Two answers were given, and one of them is gone.
    assert (await fields_of(stores, SESSION_ID))["turns"] == "1"


async def test_a_turn_that_lost_its_lease_to_one_that_still_runs_leaves_it_alone(
    start_pod: StartPod, put_agent: PutAgent, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put_agent(graph="gated")
    late, other = await start_pod(lease_s=1), await start_pod(lease_s=60)
    monkeypatch.setattr(late.stores.sessions, "renew", forgotten)
    late.gated.failing.add("Late, and failing")
    for message, expected in (("Late", (409, "turn_superseded")), ("Late, and failing", (502, "graph_failed"))):
        first = late.send(message, SESSION_ID)
        await late.gated.has_started(message)
        second = other.send(f"Other than {message}", SESSION_ID)
        await other.gated.has_started(f"Other than {message}")
        held = await fields_of(stores, SESSION_ID)
        late.gated.let_go(message)
        assert outcome(await first) == expected
        assert await fields_of(stores, SESSION_ID) == held
        other.gated.let_go(f"Other than {message}")
        assert (await second).status_code == 200


async def test_a_turn_longer_than_its_lease_renews_it_and_is_committed(
    start_pod: StartPod, put_agent: PutAgent, stores: Stores
) -> None:
    await put_agent(graph="gated")
    pod, other = await start_pod(lease_s=1), await start_pod(lease_s=1)
    sent = pod.send("Hello", SESSION_ID)
    await pod.gated.has_started("Hello")
    await lease_over(stores, (await fields_of(stores, SESSION_ID))["turn_lease_until"])
    assert outcome(await other.ask("Other", SESSION_ID, if_busy="reject")) == (409, "turn_in_progress")
    pod.gated.open()
    assert outcome(await sent) == (200, "Answer to Hello")


async def test_control_without_renewing_the_lease_is_taken(
    start_pod: StartPod, put_agent: PutAgent, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put_agent(graph="gated")
    pod, other = await start_pod(lease_s=1), await start_pod(lease_s=1)
    monkeypatch.setattr(pod.stores.sessions, "renew", forgotten)
    other.gated.open()
    sent = pod.send("Hello", SESSION_ID)
    await pod.gated.has_started("Hello")
    await lease_over(stores, (await fields_of(stores, SESSION_ID))["turn_lease_until"])
    assert outcome(await other.ask("Other", SESSION_ID, if_busy="reject")) == (200, "Answer to Other")
    pod.gated.open()
    assert outcome(await sent) == (409, "turn_superseded")


async def test_a_session_that_ends_while_a_turn_runs_takes_no_answer(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, stores: Stores, flush: Flush, rows: Rows
) -> None:
    await put_agent(graph="gated")
    running = pod_a.send("Running", SESSION_ID)
    await pod_a.gated.has_started("Running")
    queued = pod_b.send("Queued", SESSION_ID)
    await waiting(stores, 1)
    assert (await pod_b.client.post(f"/api/sessions/{SESSION_ID}/end")).json()["status"] == "ended"
    assert outcome(await queued) == (410, "session_ended")
    pod_a.gated.open()
    assert outcome(await running) in ((409, "turn_superseded"), (410, "session_ended"))
    assert await pod_b.transcript(SESSION_ID) == []
    assert outcome(await pod_a.ask("Later", SESSION_ID)) == (410, "session_ended")
    await flush()
    assert await stored(rows) == []
    assert [tuple(row) for row in await rows("SELECT status, message_count FROM agent_sessions")] == [("ended", 0)]


async def test_a_session_that_is_erased_while_a_turn_runs_stays_erased(
    pod_a: ServedPod, pod_b: ServedPod, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent(graph="gated")
    running = pod_a.send("Running", SESSION_ID)
    await pod_a.gated.has_started("Running")
    assert (await pod_b.client.delete(f"/api/sessions/{SESSION_ID}")).status_code == 204
    pod_a.gated.open()
    assert outcome(await running) in ((409, "turn_superseded"), (410, "session_erased"))
    await flush()
    assert await stored(rows) == []
    assert await rows("SELECT 1 FROM agent_sessions") == []


# ----------------------------------------------------------------------------------------------------------------- tokens


async def test_an_agent_that_requires_tokens_takes_no_ids_that_clients_made_up(
    pod_a: ServedPod, put_agent: PutAgent, stores: Stores
) -> None:
    await put_agent(graph="echo", require_token=True)
    assert outcome(await pod_a.ask("Hello", SESSION_ID)) == (404, "session_not_found")
    opened = await pod_a.client.post("/api/sessions", json={"agent_id": "shop", "session_id": SESSION_ID})
    assert outcome(opened) == (401, "session_token_required")
    assert await stores.client.exists(stores.keys.session(SESSION_ID)) == 0


async def test_an_agent_that_requires_tokens_answers_in_sessions_that_it_minted(
    pod_a: ServedPod, put_agent: PutAgent
) -> None:
    await put_agent(graph="echo", require_token=True)
    opened = (await pod_a.client.post("/api/sessions", json={"agent_id": "shop"})).json()
    assert outcome(await pod_a.ask("Hello", opened["session_id"])) == (401, "session_token_required")
    pod_a.client.headers["Authorization"] = f"Bearer {opened['session_token']}"
    assert outcome(await pod_a.ask("Hello", opened["session_id"])) == (200, "You said: Hello")
    assert outcome(await pod_a.ask("Hello", SESSION_ID)) == (401, "session_token_invalid")


# -------------------------------------------------------------------------------------------------------- the end of a pod


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
