"""Messages that come while a turn runs: they wait, are rejected, or interrupt it."""

import asyncio

from gateway.app import Stores
from tests.conftest import PutAgent
from tests.support.pods import ServedPod, fields_of
from tests.support.serving import wait_for
from tests.turns.conftest import SESSION_ID, Flush, Rows, StartPod, outcome, stored, waiting


async def opened(pod: ServedPod) -> None:
    """Opens the session."""
    answer = await pod.client.post("/api/sessions", json={"agent_id": "shop", "session_id": SESSION_ID})
    assert answer.status_code == 201, answer.text


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
