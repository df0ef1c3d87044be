"""Floods: what one address, one session or one website wants to take from all others.

Each attack is refused with its status and code, and the honest call beside it passes. All come through a proxy that is
believed, so that a test can call from any address.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any

import httpx
import pytest

from gateway.limits import admission
from gateway.limits.buckets import Bucket, remaining_of
from gateway.limits.ledger import Ledger
from gateway.settings import Settings
from persistence.model.agents import RateLimit
from tests.conftest import PutAgent
from tests.support.pods import ServedPod, gated_pod
from tests.support.serving import wait_for
from tests.support.visiting import Rows, new_session_id, post_message, problem

ATTACKER = "203.0.113.66"
VISITOR = "198.51.100.7"
LIMIT = 5


@pytest.fixture
async def pod(settings: Settings, put_agent: PutAgent) -> AsyncIterator[ServedPod]:
    """A pod behind a proxy, with small limits, and an agent that has none of its own."""
    await put_agent("shop")
    limits: dict[str, Any] = {
        "address_rate_limit": f"{LIMIT}/600",
        "address_session_limit": "4/600",
        "max_streams_per_session": 3,
        "max_streams_per_address": 5,
    }
    async with gated_pod(settings, **limits) as served:
        yield served


def sent_from(address: str, **headers: str) -> dict[str, str]:
    """The headers of a request from an address, as the proxy sends them on."""
    return {"X-Forwarded-For": address, **headers}


async def ask(pod: ServedPod, address: str, session_id: str = "", **options: Any) -> httpx.Response:
    """Sends a message from an address."""
    headers = sent_from(address, **options.pop("headers", {}))
    return await post_message(pod.client, session_id or new_session_id(), headers=headers, **options)


async def flood(pod: ServedPod, address: str, times: int, session_id: str = "", **options: Any) -> list[httpx.Response]:
    """Sends many messages from an address at the same time."""
    return list(await asyncio.gather(*(ask(pod, address, session_id, **options) for _ in range(times))))


def statuses(answers: list[httpx.Response]) -> dict[int, int]:
    """How often each status was answered."""
    found = [answer.status_code for answer in answers]
    return {status: found.count(status) for status in sorted(set(found))}


async def passes(pod: ServedPod, address: str = VISITOR, session_id: str = "", **options: Any) -> None:
    """The honest call."""
    answer = await ask(pod, address, session_id, **options)
    assert answer.status_code == 200, answer.text


async def open_session(pod: ServedPod, address: str, **body: Any) -> httpx.Response:
    return await pod.client.post("/api/sessions", json={"agent_id": "shop", **body}, headers=sent_from(address))


# ---------------------------------------------------------------------------------------------------- from one address


async def test_flooding_from_one_address_until_others_are_refused(pod: ServedPod, put_agent: PutAgent) -> None:
    session_id = new_session_id()
    await passes(pod, ATTACKER, session_id)
    answers = await flood(pod, ATTACKER, 10 * LIMIT, session_id, message_id="the-same")
    assert statuses(answers) == {200: LIMIT - 1, 429: 9 * LIMIT + 1}
    refused = next(answer for answer in answers if answer.status_code == 429)
    problem(refused, 429, "rate_limited")
    assert 1 <= int(refused.headers["retry-after"]) <= 120
    assert refused.headers["ratelimit"].startswith('"address";r=0;t=')
    for _ in range(LIMIT - 1):
        await passes(pod)


async def test_flooding_from_one_address_over_both_kinds_of_call(pod: ServedPod) -> None:
    session_id = new_session_id()
    for _ in range(LIMIT):
        await passes(pod, ATTACKER, session_id)
    body = {"message": "Hello", "session_id": session_id}
    for path in ("message", "stream"):
        answer = await pod.client.post(f"/api/chat/shop/{path}", json=body, headers=sent_from(ATTACKER))
        problem(answer, 429, "rate_limited")
    problem(await open_session(pod, ATTACKER), 429, "rate_limited")
    answer = await pod.client.post("/api/chat/shop/stream", json=body, headers=sent_from(VISITOR))
    assert answer.status_code == 200
    assert (await open_session(pod, VISITOR)).status_code == 201


async def test_having_postgres_asked_for_what_is_not_there(pod: ServedPod, put_agent: PutAgent) -> None:
    """Sessions and agents that there are not; the same address may talk on, and so may everybody else."""
    session_id = new_session_id()
    await passes(pod, ATTACKER, session_id)

    async def look(path: str, address: str) -> httpx.Response:
        return await pod.client.get(path, headers=sent_from(address))

    for number in range(LIMIT):
        unknown = f"/api/chat/unknown-{number}" if number % 2 else f"/api/sessions/{new_session_id()}"
        problem(await look(unknown, ATTACKER), 404, "agent_not_found" if number % 2 else "session_not_found")
    for path in ("/api/chat/unknown", f"/api/sessions/{new_session_id()}", f"/api/sessions/{new_session_id()}/messages"):
        problem(await look(path, ATTACKER), 429, "rate_limited")
        assert (await look(path, VISITOR)).status_code == 404
    assert (await look(f"/api/sessions/{session_id}", VISITOR)).status_code == 200


async def test_having_large_bodies_read_after_the_limit_is_reached(pod: ServedPod) -> None:
    """A refusal is given before the body is looked at: it costs the pod next to nothing."""
    session_id = new_session_id()
    for _ in range(LIMIT):
        await passes(pod, ATTACKER, session_id)
    answer = await pod.client.post("/api/chat/shop/message", content=b"[" * 200_000, headers=sent_from(ATTACKER))
    problem(answer, 429, "rate_limited")
    answer = await pod.client.post("/api/chat/shop/message", content=b"[" * 200_000, headers=sent_from(VISITOR))
    problem(answer, 415, "unsupported_media_type")
    await passes(pod)


async def test_rotating_addresses_within_an_ipv6_network(pod: ServedPod) -> None:
    session_id = new_session_id()
    for number in range(LIMIT):
        await passes(pod, f"2001:db8:bad:1::{number:x}", session_id)
    for host in ("ffff:ffff:ffff:ffff", "0:0:0:1", "dead:beef:0:1"):
        problem(await ask(pod, f"2001:db8:bad:1:{host}", session_id), 429, "rate_limited")
    await passes(pod, "2001:db8:bad:2::1")


async def test_without_the_networks_of_ipv6_each_address_would_have_a_limit_of_its_own(
    pod: ServedPod, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test before."""
    monkeypatch.setattr(admission, "network", lambda address: address)
    session_id = new_session_id()
    for number in range(LIMIT + 3):
        await passes(pod, f"2001:db8:bad:1::{number:x}", session_id)


async def test_writing_one_address_in_many_ways(pod: ServedPod) -> None:
    session_id = new_session_id()
    ways = [ATTACKER, f"::ffff:{ATTACKER}", f"{ATTACKER}:4711", "::ffff:cb00:7142", f"[::ffff:{ATTACKER}]:1"]
    for way in ways:
        await passes(pod, way, session_id)
    for way in ways:
        problem(await ask(pod, way, session_id), 429, "rate_limited")
    await passes(pod)


async def test_forging_the_forwarded_header_to_be_somebody_else_each_time(pod: ServedPod, rows: Rows) -> None:
    """What the client writes itself stands before what the proxy appends."""
    session_id = new_session_id()
    for number in range(LIMIT):
        await passes(pod, f"192.0.2.{number}, {ATTACKER}", session_id)
    problem(await ask(pod, f"192.0.2.200, {ATTACKER}", session_id), 429, "rate_limited")
    problem(await ask(pod, f"127.0.0.1, 127.0.0.1, {ATTACKER}, 127.0.0.1", session_id), 429, "rate_limited")
    stored = await pod.stores.client.hget(pod.stores.keys.session(session_id), "ip_address")
    assert stored == ATTACKER.encode()
    # Whom it pretended to be has all of its messages left.
    for _ in range(LIMIT - 1):
        await passes(pod, "192.0.2.0")


async def test_where_every_address_is_believed_a_proxy_that_appends_lets_the_header_be_forged(
    settings: Settings, put_agent: PutAgent
) -> None:
    """The control of the test before; and why `*` is right only where the balancer drops what a client wrote."""
    await put_agent("shop")
    async with gated_pod(settings, trusted_proxies="*", address_rate_limit="2/600") as credulous:
        session_id = new_session_id()
        for number in range(5):
            await passes(credulous, f"192.0.2.{number}, {ATTACKER}", session_id)


async def test_forging_the_forwarded_header_where_no_proxy_is_believed(settings: Settings, put_agent: PutAgent) -> None:
    await put_agent("shop")
    async with gated_pod(settings, trusted_proxies="", address_rate_limit="2/600") as bare:
        session_id = new_session_id()
        for number in range(2):
            await passes(bare, f"192.0.2.{number}", session_id)
        problem(await ask(bare, "192.0.2.9", session_id), 429, "rate_limited")
        stored = await bare.stores.client.hget(bare.stores.keys.session(session_id), "ip_address")
        assert stored == b"127.0.0.1"


@pytest.mark.parametrize("garbage", ["", "unknown", "a" * 5000, "1.2.3.4'; --", "${jndi:ldap://x}", "1.2.3.4, nobody"])
async def test_putting_garbage_where_an_address_belongs(pod: ServedPod, garbage: str) -> None:
    """It is the proxy's own bucket that it is charged to, and no garbage is stored or becomes a key."""
    session_id = new_session_id()
    for _ in range(LIMIT):
        await passes(pod, garbage, session_id)
    problem(await ask(pod, garbage + "?", session_id), 429, "rate_limited")
    assert await pod.stores.client.hget(pod.stores.keys.session(session_id), "ip_address") == b"127.0.0.1"
    await pod.pod.limiter.sync()
    keys = [key.decode() async for key in pod.stores.client.scan_iter(match="gw:limit:*")]
    assert {key.partition("}:")[2] for key in keys} == {"address:127.0.0.1", "sessions:127.0.0.1"}
    await passes(pod)


async def test_filling_a_pods_memory_with_addresses(pod: ServedPod) -> None:
    pod.pod.ledger.max_buckets = 20
    session_id = new_session_id()
    for _ in range(LIMIT):
        await passes(pod, ATTACKER, session_id)
    for number in range(60):
        await passes(pod, f"2001:db8:{number:x}::1", session_id)
    assert len(pod.pod.ledger.keys) <= 20
    # The flood did not make the pod forget who has used its limit up.
    problem(await ask(pod, ATTACKER, session_id), 429, "rate_limited")
    await passes(pod)


# ------------------------------------------------------------------------------------------------- what others share


async def test_draining_the_bucket_of_another_website(pod: ServedPod, put_agent: PutAgent) -> None:
    await put_agent("busy", domain_rate_limit=RateLimit(3, 600))
    own, victim = {"Origin": "https://evil.example"}, {"Origin": "https://shop.example"}
    session_id = new_session_id()
    metadata = {"website_domain": "shop.example"}
    for _ in range(3):
        # The Origin goes before what the body claims.
        await passes(pod, ATTACKER, session_id, agent="busy", headers=own, metadata=metadata)
    answer = await ask(pod, ATTACKER, session_id, agent="busy", headers=own, metadata=metadata)
    problem(answer, 429, "rate_limited")
    assert answer.json()["detail"] == "too many messages from this website"
    for _ in range(3):
        await passes(pod, VISITOR, agent="busy", headers=victim)


async def test_draining_another_agent_through_ones_own(pod: ServedPod, put_agent: PutAgent) -> None:
    await put_agent("mine", agent_rate_limit=RateLimit(2, 600))
    await put_agent("theirs", agent_rate_limit=RateLimit(2, 600))
    answers = await flood(pod, ATTACKER, 20, agent="mine")
    assert statuses(answers) == {200: 2, 429: 18}
    for _ in range(2):
        await passes(pod, agent="theirs")


async def test_draining_an_agents_limit_by_calls_that_are_refused(pod: ServedPod, put_agent: PutAgent) -> None:
    """Refused for any reason, they cost nobody anything: not the agent, not the website, not the address."""
    await put_agent(
        "fragile",
        agent_rate_limit=RateLimit(2, 600),
        domain_rate_limit=RateLimit(2, 600),
        turns_per_day=2,
        allowed_domains=("shop.example",),
        channels=("text",),
    )
    here = {"Origin": "https://shop.example"}
    minted = await pod.client.post("/api/sessions", json={"agent_id": "fragile"}, headers=sent_from(VISITOR, **here))
    session_id = minted.json()["session_id"]

    def call(**options: Any) -> Any:
        return ask(pod, ATTACKER, options.pop("session_id", ""), agent="fragile", **options)

    for _ in range(LIMIT):
        problem(await call(headers={"Origin": "https://evil.example"}), 403, "domain_not_allowed")
        problem(await call(headers=here, session_id=session_id), 401, "session_token_required")
        bad = here | {"Authorization": "Bearer forged"}
        problem(await call(headers=bad, session_id=session_id), 401, "session_token_invalid")
        problem(await call(headers=here, channel="voice"), 403, "channel_not_allowed", "channel")
        problem(await call(headers=here, message="\0"), 422, "invalid_field", "message")
        problem(await call(headers=here, message=""), 422, "invalid_field", "message")
    own = {"Authorization": f"Bearer {minted.json()['session_token']}"} | here
    for _ in range(2):
        await passes(pod, VISITOR, session_id, agent="fragile", headers=own)
    problem(await call(headers=own, session_id=session_id), 429, "rate_limited")
    await passes(pod, ATTACKER)


async def test_draining_an_address_by_a_session_that_is_over_its_own_limit(pod: ServedPod, put_agent: PutAgent) -> None:
    await put_agent("chatty", rate_limit=RateLimit(1, 600))
    session_id = new_session_id()
    await passes(pod, ATTACKER, session_id, agent="chatty")
    for _ in range(3 * LIMIT):
        problem(await ask(pod, ATTACKER, session_id, agent="chatty"), 429, "rate_limited")
    # Of the five messages of that address one was answered.
    for _ in range(LIMIT - 2):
        await passes(pod, ATTACKER, agent="chatty")


async def test_what_is_not_given_back_drains_the_address(
    pod: ServedPod, put_agent: PutAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the tests before: without giving back, refused calls use the limit up."""
    monkeypatch.setattr(Ledger, "refund", lambda *_: None)
    await put_agent("chatty", rate_limit=RateLimit(1, 600))
    session_id = new_session_id()
    await passes(pod, ATTACKER, session_id, agent="chatty")
    for _ in range(LIMIT - 1):
        problem(await ask(pod, ATTACKER, session_id, agent="chatty"), 429, "rate_limited")
    problem(await ask(pod, ATTACKER), 429, "rate_limited")
    await passes(pod)


async def test_a_storm_of_retries_of_one_message(pod: ServedPod, put_agent: PutAgent) -> None:
    """Each answer given again costs the address, and neither the agent nor its day."""
    await put_agent("paid", agent_rate_limit=RateLimit(3, 600), turns_per_day=3)
    session_id = new_session_id()
    answers = [await ask(pod, ATTACKER, session_id, agent="paid", message_id="m1") for _ in range(3 * LIMIT)]
    assert statuses(answers) == {200: LIMIT, 429: 2 * LIMIT}
    assert [answer.json()["metadata"]["replayed"] for answer in answers[:LIMIT]] == [False] + [True] * (LIMIT - 1)
    problem(answers[-1], 429, "rate_limited")
    for _ in range(2):
        await passes(pod, agent="paid")
    problem(await ask(pod, VISITOR, agent="paid"), 429, "rate_limited")


async def test_using_up_a_days_quota_by_repeating_it_on_another_pod(
    pod: ServedPod, settings: Settings, put_agent: PutAgent
) -> None:
    await put_agent("daily", turns_per_day=2)
    await put_agent("other", turns_per_day=2)
    for _ in range(2):
        await passes(pod, ATTACKER, agent="daily")
    await pod.pod.limiter.sync()
    async with gated_pod(settings) as restarted:
        refused = await ask(restarted, ATTACKER, agent="daily")
        problem(refused, 429, "quota_exhausted")
        assert 0 < int(refused.headers["retry-after"]) <= 86_400
        assert refused.headers["ratelimit"].startswith('"day";r=0;t=')
        await passes(restarted, agent="other")


async def test_holding_all_places_of_an_agent_by_messages_that_wait(pod: ServedPod, put_agent: PutAgent) -> None:
    """Three messages wait for one session: they run nothing and take nobody's place."""
    await put_agent("narrow", graph="gated", max_running_turns=2, turn_timeout_s=20)
    session_id = new_session_id()

    def send(message: str, session_id: str, address: str) -> "asyncio.Task[httpx.Response]":
        return asyncio.create_task(ask(pod, address, session_id, agent="narrow", message=message))

    held = [send(message, session_id, ATTACKER) for message in ("One", "Two", "Three", "Four")]
    await wait_for(lambda: len(pod.gated.started) == 1, "the first runs")

    async def waiting() -> bool:
        found = await pod.stores.client.hget(pod.stores.keys.session(session_id), "waiting")
        return len((found or b"").split()) == 3

    await wait_for(waiting, "the others wait")
    honest = send("Honest", new_session_id(), VISITOR)
    await pod.gated.has_started("Honest")
    problem(await ask(pod, "198.51.100.8", agent="narrow"), 429, "agent_busy")
    pod.gated.open()
    assert (await honest).status_code == 200
    assert {answer.status_code for answer in await asyncio.gather(*held)} <= {200, 429}


async def test_filling_a_sessions_queue_costs_no_bucket_of_others(pod: ServedPod, put_agent: PutAgent) -> None:
    await put_agent("slow", graph="gated", agent_rate_limit=RateLimit(6, 600))
    session_id = new_session_id()
    addresses = [f"203.0.113.{number}" for number in range(10)]
    calls = [
        asyncio.create_task(ask(pod, address, session_id, agent="slow", message=f"from {address}")) for address in addresses
    ]
    await wait_for(lambda: sum(call.done() for call in calls) == 6, "one runs, three wait, six are refused")
    for call in calls:
        if call.done():
            assert call.result().json()["code"] in ("queue_full", "rate_limited")
            assert "retry-after" in call.result().headers
    # Four of six are in use: two are left for others, however many were refused.
    pod.gated.open()
    for _ in range(2):
        await passes(pod, agent="slow")
    await asyncio.gather(*calls)


# -------------------------------------------------------------------------------------------------- sessions without end


async def test_minting_sessions_without_end(pod: ServedPod) -> None:
    answers = [await open_session(pod, ATTACKER) for _ in range(5)]
    assert statuses(answers) == {201: 4, 429: 1}
    problem(answers[-1], 429, "rate_limited")
    assert answers[-1].json()["detail"] == "too many new sessions from this address"
    assert answers[-1].headers["ratelimit"].startswith('"sessions";r=0;t=')
    assert (await open_session(pod, VISITOR)).status_code == 201


async def test_making_sessions_up_without_end(pod: ServedPod, rows: Rows) -> None:
    """Ids that a browser makes up are charged when a session comes of them, whichever call makes it."""
    known = new_session_id()
    await passes(pod, ATTACKER, known)
    for _ in range(3):
        assert (await open_session(pod, ATTACKER, session_id=new_session_id())).status_code == 201
    invented = new_session_id()
    problem(await ask(pod, ATTACKER, invented), 429, "rate_limited")
    assert not await pod.stores.client.exists(pod.stores.keys.session(invented))
    # Its session goes on, and so do others.
    await passes(pod, ATTACKER, known)
    await passes(pod)


async def test_making_sessions_up_at_the_same_time(pod: ServedPod) -> None:
    """No number of calls at once gets past the check: a place is taken before the session is made."""
    answers = await asyncio.gather(*(open_session(pod, ATTACKER, session_id=new_session_id()) for _ in range(LIMIT)))
    assert statuses(list(answers)) == {201: 4, 429: 1}
    live = [key async for key in pod.stores.client.scan_iter(match="gw:*:session:*")]
    assert len(live) == 4
    assert (await open_session(pod, VISITOR)).status_code == 201


async def test_using_up_anothers_sessions_by_opening_its_own_again(pod: ServedPod) -> None:
    known = new_session_id()
    for _ in range(LIMIT):
        assert (await open_session(pod, VISITOR, session_id=known)).status_code in (200, 201)
    assert remaining_of(RateLimit(4, 600), pod.pod.ledger.ahead_s(f"sessions:{VISITOR}")) == 3
    for _ in range(3):
        assert (await open_session(pod, "198.51.100.8")).status_code == 201


# ------------------------------------------------------------------------------------------------------------- streams


async def feed(pod: ServedPod, stack: AsyncExitStack, address: str, session_id: str) -> httpx.Response:
    """Opens the feed of a session and leaves it open; the answer, of which a problem has been read."""
    path = f"/api/sessions/{session_id}/events"
    answer = await stack.enter_async_context(pod.client.stream("GET", path, headers=sent_from(address)))
    if answer.status_code != 200:
        await answer.aread()
    return answer


async def test_opening_streams_of_one_session_without_end(pod: ServedPod) -> None:
    session_id, other = new_session_id(), new_session_id()
    await passes(pod, ATTACKER, session_id)
    await passes(pod, VISITOR, other)
    async with AsyncExitStack() as stack:
        for _ in range(3):
            assert (await feed(pod, stack, ATTACKER, session_id)).status_code == 200
        refused = await feed(pod, stack, ATTACKER, session_id)
        problem(refused, 429, "too_many_streams")
        assert refused.headers["retry-after"] == "5"
        # From another address it is the same session.
        problem(await feed(pod, stack, "203.0.113.67", session_id), 429, "too_many_streams")
        body = {"message": "Hello", "session_id": session_id}
        answer = await pod.client.post("/api/chat/shop/stream", json=body, headers=sent_from(ATTACKER))
        problem(answer, 429, "too_many_streams")
        assert (await feed(pod, stack, VISITOR, other)).status_code == 200
    await wait_for(lambda: not open_streams(pod), "the streams are closed")
    async with AsyncExitStack() as stack:
        assert (await feed(pod, stack, ATTACKER, session_id)).status_code == 200


def open_streams(pod: ServedPod) -> dict[str, int]:
    """What the pod counts."""
    return pod.pod.open_streams.counts


async def test_opening_streams_from_one_address_without_end(pod: ServedPod) -> None:
    sessions = [new_session_id() for _ in range(3)]
    for number, session_id in enumerate(sessions):
        await passes(pod, f"198.51.100.{number}", session_id)
    async with AsyncExitStack() as stack:
        for number in range(5):
            assert (await feed(pod, stack, ATTACKER, sessions[number % 3])).status_code == 200
        problem(await feed(pod, stack, ATTACKER, sessions[2]), 429, "too_many_streams")
        assert (await feed(pod, stack, VISITOR, sessions[2])).status_code == 200
    await wait_for(lambda: not open_streams(pod), "the streams are closed")


async def test_without_the_bound_any_number_of_streams_is_open(settings: Settings, put_agent: PutAgent) -> None:
    """The control of the tests before."""
    await put_agent("shop")
    async with gated_pod(settings, max_streams_per_session=1, limit_mode="off") as unbound, AsyncExitStack() as stack:
        session_id = new_session_id()
        await passes(unbound, VISITOR, session_id)
        for _ in range(6):
            assert (await feed(unbound, stack, ATTACKER, session_id)).status_code == 200


async def test_taking_a_sessions_streams_without_a_right_to_it(pod: ServedPod) -> None:
    """Who may not read the session holds none of its places, however often it asks."""
    minted = (await open_session(pod, VISITOR)).json()
    session_id = minted["session_id"]
    for _ in range(10):
        async with AsyncExitStack() as stack:
            problem(await feed(pod, stack, ATTACKER, session_id), 401, "session_token_required")
    assert open_streams(pod) == {}
    path = f"/api/sessions/{session_id}/events"
    headers = sent_from(VISITOR, Authorization=f"Bearer {minted['session_token']}")
    async with pod.client.stream("GET", path, headers=headers) as answer:
        assert answer.status_code == 200
        assert open_streams(pod) == {f"address:{VISITOR}": 1, f"session:{session_id}": 1}
    await wait_for(lambda: not open_streams(pod), "the stream is closed")


async def test_leaving_streams_behind_until_none_can_be_opened(pod: ServedPod) -> None:
    """Streams that end in whatever way, or were refused, are counted no more."""
    session_id = new_session_id()
    await passes(pod, VISITOR, session_id)
    for number in range(10):
        async with AsyncExitStack() as stack:
            assert (await feed(pod, stack, ATTACKER, session_id)).status_code == 200
        body = {"message": "Hello", "session_id": session_id}
        address = f"192.0.2.{number}"
        streamed = await pod.client.post("/api/chat/shop/stream", json=body, headers=sent_from(address))
        assert streamed.status_code == 200
        await wait_for(lambda: not open_streams(pod), "both have ended")
        unknown = await pod.client.get(f"/api/sessions/{new_session_id()}/events", headers=sent_from(address))
        problem(unknown, 404, "session_not_found")
    assert open_streams(pod) == {}


def test_a_bucket_that_took_back_too_much_would_let_others_through() -> None:
    """The control of what is given back late: without the rule, a call refused at leisure makes room that there is not."""
    bucket = Bucket(RateLimit(1, 10))
    bucket.charge(100.0)
    bucket.charge(115.0)
    bucket.busy_since_s = 0.0  # the rule is gone
    bucket.refund(100.0)
    assert bucket.wait_s(116.0) <= 0, "room, although the turn of 115 is nine seconds from over"
