"""Turns that outlive their lease, or their session."""

import asyncio
from datetime import datetime
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from gateway.app import Stores
from tests.conftest import PutAgent
from tests.support.pods import ServedPod, fields_of, rewrite
from tests.support.serving import wait_for
from tests.turns.conftest import SESSION_ID, Flush, Rows, StartPod, outcome, stored, waiting


async def lease_over(stores: Stores, lease_until: str) -> None:
    """Waits until Redis' clock has passed a moment that the session hash names."""

    async def is_over() -> bool:
        seconds, microseconds = await stores.client.execute_command("TIME")
        return bool(int(seconds) + int(microseconds) / 1e6 > datetime.fromisoformat(lease_until).timestamp())

    await wait_for(is_over, "the lease runs out")


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
    # The turn that had lost the session is in it all the same, behind one that it has not seen.
    assert (await fields_of(stores, SESSION_ID))["turns"] == "2"


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


async def test_a_renewal_that_fails_in_an_unforeseen_way_is_repeated(
    start_pod: StartPod, put_agent: PutAgent, stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    await put_agent(graph="gated")
    pod, other = await start_pod(lease_s=2), await start_pod(lease_s=2)
    renew, failed = pod.stores.sessions.renew, asyncio.Event()

    async def fails_once(*arguments: Any) -> bool:
        if not failed.is_set():
            failed.set()
            raise KeyError("unforeseen")
        return await renew(*arguments)

    monkeypatch.setattr(pod.stores.sessions, "renew", fails_once)
    with capture_logs() as lines:
        sent = pod.send("Hello", SESSION_ID)
        await pod.gated.has_started("Hello")
        await lease_over(stores, (await fields_of(stores, SESSION_ID))["turn_lease_until"])
        assert outcome(await other.ask("Other", SESSION_ID, if_busy="reject")) == (409, "turn_in_progress")
    assert [line["log_level"] for line in lines if line["event"] == "turn.renew_failed"] == ["error"]
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
