"""Messages that are refused: beyond the session's rate limit, or in sessions that the gateway did not open."""

from gateway.app import Stores
from tests.conftest import PutAgent
from tests.support.pods import ServedPod, fields_of
from tests.support.serving import wait_for
from tests.turns.conftest import SESSION_ID, outcome, waiting


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
