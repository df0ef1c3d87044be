"""Attacks on the operators' side: guessing the admin key, stealing it on its way, using it without a trace."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import msgspec
import pytest
from structlog.testing import capture_logs

from gateway.access.admin_key import FAILURES
from gateway.app import Stores, build_pod
from gateway.settings import Settings
from persistence.model.ids import masked
from tests.conftest import PutAgent
from tests.support.serving import ADMIN, ADMIN_KEY, served
from tests.support.stored import Rows
from tests.support.visiting import Flush, new_session_id, post_message, problem, say

WRONG = {"Authorization": "Bearer a guess at the admin key"}
LOOKS = ("/api/sessions", "/api/sessions/stats", "/api/agents", "/api/agents/shop")


def through_proxy(address: str, scheme: str = "https") -> dict[str, str]:
    """What a proxy that is trusted says of a client."""
    return {"X-Forwarded-For": address, "X-Forwarded-Proto": scheme}


OPERATOR, GUESSER = through_proxy("198.51.100.1"), through_proxy("203.0.113.66")


@pytest.fixture(autouse=True)
async def shop(put_agent: PutAgent) -> None:
    await put_agent("shop")


@pytest.fixture
async def bare(settings: Settings, stores: Stores) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a pod that trusts no proxy, which is the default."""
    untrusting = msgspec.structs.replace(settings, trusted_proxies="")
    async with served(await build_pod(untrusting, stores)) as client:
        yield client


async def is_operator(client: httpx.AsyncClient, **headers: str) -> None:
    """The honest call: an operator is answered."""
    answer = await client.get("/api/sessions", headers=ADMIN | headers)
    assert answer.status_code == 200, answer.text


# ------------------------------------------------------------------------------------------------------- guessing the key


async def test_guessing_the_admin_key_without_end(client: httpx.AsyncClient) -> None:
    for number in range(FAILURES):
        problem(await client.get(LOOKS[number % 4], headers=WRONG | GUESSER), 401, "admin_key_required")
    for path in LOOKS:
        told = problem(await client.get(path, headers=WRONG | GUESSER), 429, "rate_limited")
        assert 0 < told["retry_after"] <= 60
    await is_operator(client, **OPERATOR)


async def test_learning_that_a_guess_was_right_while_shut_out(client: httpx.AsyncClient) -> None:
    """The answer to the right key is the one to a wrong key, to the letter."""
    for _ in range(FAILURES):
        await client.get("/api/sessions", headers=WRONG | GUESSER)
    answers = [await client.get("/api/sessions", headers=given | GUESSER) for given in (WRONG, ADMIN)]
    one, other = ({**answer.json(), "request_id": "", "retry_after": 0} for answer in answers)
    problem(answers[1], 429, "rate_limited")
    assert one == other
    assert answers[0].headers.keys() == answers[1].headers.keys()
    await is_operator(client, **OPERATOR)


async def test_guessing_it_through_the_routes_of_visitors(client: httpx.AsyncClient) -> None:
    """Which take it too: they are no way around the limit."""
    session_id = new_session_id()
    await say(client, session_id)
    routes = [
        ("GET", f"/api/sessions/{session_id}"),
        ("GET", f"/api/sessions/{session_id}/messages"),
        ("GET", f"/api/sessions/{session_id}/events"),
        ("POST", f"/api/sessions/{session_id}/end"),
        ("DELETE", f"/api/sessions/{session_id}"),
    ]
    for number in range(FAILURES):
        method, path = routes[number % len(routes)]
        problem(await client.request(method, path, headers=WRONG | GUESSER), 401, "session_token_invalid")
    for method, path in routes:
        for given in (WRONG, ADMIN):
            problem(await client.request(method, path, headers=given | GUESSER), 429, "rate_limited")
    problem(await client.get("/api/sessions", headers=ADMIN | GUESSER), 429, "rate_limited")
    assert (await client.get(f"/api/sessions/{session_id}", headers=ADMIN | OPERATOR)).status_code == 200


async def test_shutting_visitors_out_by_guessing_from_their_network(client: httpx.AsyncClient) -> None:
    """A guesser behind the same address costs only those their access who come with an admin key."""
    opened = (await client.post("/api/sessions", json={"agent_id": "shop"})).json()
    for _ in range(2 * FAILURES):
        await client.get("/api/sessions", headers=WRONG | GUESSER)
    token = {"Authorization": f"Bearer {opened['session_token']}"}
    for headers in (token | GUESSER, token):
        assert (await client.get(f"/api/sessions/{opened['session_id']}", headers=headers)).status_code == 200
    assert (await post_message(client, opened["session_id"], headers=token | GUESSER)).status_code == 200
    assert (await post_message(client, new_session_id(), headers=GUESSER)).status_code == 200


async def test_shutting_the_operator_out_with_session_tokens_that_are_worth_nothing(client: httpx.AsyncClient) -> None:
    """Old tokens come back all the time: they are no guesses at the admin key."""
    expired = {"Authorization": "Bearer eyJhbGciOiJIUzI1NiJ9.eyJzaWQiOiJ4In0.AAAA"}
    for _ in range(2 * FAILURES):
        problem(await client.get(f"/api/sessions/{new_session_id()}", headers=expired), 401, "session_token_invalid")
        problem(await client.get("/api/sessions", headers=expired), 401, "admin_key_required")
    await is_operator(client)


async def test_shutting_the_operator_out_by_posing_as_his_address(client: httpx.AsyncClient) -> None:
    """What a client itself writes into X-Forwarded-For stands before what the proxy adds, and is not believed."""
    forged = {"X-Forwarded-For": f"{OPERATOR['X-Forwarded-For']}, 203.0.113.66", "X-Forwarded-Proto": "https"}
    for _ in range(FAILURES):
        await client.get("/api/sessions", headers=WRONG | forged)
    problem(await client.get("/api/sessions", headers=ADMIN | forged), 429, "rate_limited")
    await is_operator(client, **OPERATOR)


async def test_guessing_from_all_the_addresses_of_one_network(client: httpx.AsyncClient) -> None:
    for number in range(FAILURES):
        await client.get("/api/sessions", headers=WRONG | through_proxy(f"2001:db8:1:2::{number + 1:x}"))
    last = through_proxy("2001:db8:1:2:3:4:5:6")
    problem(await client.get("/api/sessions", headers=WRONG | last), 429, "rate_limited")
    await is_operator(client, **through_proxy("2001:db8:1:3::1"))


async def test_using_a_key_that_is_no_longer_one(settings: Settings, stores: Stores) -> None:
    """While keys are changed both are taken; then the old one is worth nothing."""
    new = "another admin key, just made"
    changing = msgspec.structs.replace(settings, admin_key=new, admin_key_previous=ADMIN_KEY)
    changed = msgspec.structs.replace(settings, admin_key=new)
    for which, statuses in ((changing, [200, 200]), (changed, [401, 200])):
        async with served(await build_pod(which, stores)) as client:
            for key, status in zip((ADMIN_KEY, new), statuses, strict=True):
                answer = await client.get("/api/sessions", headers={"Authorization": f"Bearer {key}"})
                assert answer.status_code == status
                if status == 401:
                    problem(answer, 401, "admin_key_required")


async def test_becoming_an_operator_with_what_is_no_admin_key(client: httpx.AsyncClient) -> None:
    opened = (await client.post("/api/sessions", json={"agent_id": "shop"})).json()
    for headers in (
        {},
        {"Authorization": ""},
        {"Authorization": "Bearer"},
        {"Authorization": ADMIN_KEY},
        {"Authorization": f"Basic {ADMIN_KEY}"},
        {"Authorization": f"Bearer {opened['session_token']}"},
        {"Authorization": f"Bearer {ADMIN_KEY[:-1]}"},
        {"Cookie": f"Authorization=Bearer {ADMIN_KEY}"},
        {"X-Admin-Key": ADMIN_KEY},
    ):
        problem(await client.get("/api/sessions", headers=headers), 401, "admin_key_required")
    in_query = await client.get(f"/api/sessions?authorization=Bearer {ADMIN_KEY}")
    problem(in_query, 401, "admin_key_required")
    await is_operator(client)


async def test_a_second_authorization_header_beside_a_wrong_one(client: httpx.AsyncClient) -> None:
    both = [("Authorization", WRONG["Authorization"]), ("Authorization", ADMIN["Authorization"])]
    problem(await client.get("/api/sessions", headers=both), 401, "admin_key_required")
    await is_operator(client)


# --------------------------------------------------------------------------------------------- stealing the key on its way


async def test_listening_to_an_admin_key_that_is_sent_in_plain(client: httpx.AsyncClient) -> None:
    """It is refused before it is compared, so nobody gets used to it."""
    plain = through_proxy("198.51.100.1", "http")
    session_id = new_session_id()
    await say(client, session_id)
    for method, path in (
        *(("GET", path) for path in LOOKS),
        ("PUT", "/api/agents/shop"),
        ("PATCH", "/api/agents/shop"),
        ("DELETE", "/api/agents/shop"),
        ("GET", f"/api/sessions/{session_id}"),
        ("DELETE", f"/api/sessions/{session_id}"),
    ):
        for given in (ADMIN, WRONG):
            problem(await client.request(method, path, headers=given | plain), 403, "tls_required")
    await is_operator(client, **OPERATOR)
    assert (await client.get(f"/api/sessions/{session_id}", headers=plain)).status_code == 200, "a visitor needs no TLS"


async def test_posing_as_a_program_on_this_machine_through_a_proxy_on_it(bare: httpx.AsyncClient) -> None:
    """Behind a proxy that is not trusted everybody comes from the loopback; what the proxy adds tells them apart."""
    for headers in (
        {"X-Forwarded-For": "203.0.113.66"},
        {"X-Forwarded-For": "127.0.0.1"},
        {"X-Forwarded-For": ""},
        {"Forwarded": "for=127.0.0.1;proto=https"},
        {"X-Real-IP": "127.0.0.1"},
        {"X-Forwarded-Host": "gateway.example"},
        {"Via": "1.1 proxy"},
    ):
        problem(await bare.get("/api/sessions", headers=ADMIN | headers), 403, "tls_required")
    await is_operator(bare)


async def test_claiming_tls_where_no_proxy_is_trusted(bare: httpx.AsyncClient) -> None:
    claimed = {"X-Forwarded-Proto": "https"}
    problem(await bare.get("/api/sessions", headers=ADMIN | claimed), 403, "tls_required")
    problem(await bare.get("/api/sessions", headers=ADMIN | claimed | {"X-Forwarded-For": "::1"}), 403, "tls_required")
    await is_operator(bare)


async def test_posing_as_the_machine_itself_to_a_trusted_proxy(client: httpx.AsyncClient) -> None:
    for address in ("127.0.0.1", "::1", "::ffff:127.0.0.1", "127.0.0.1, 127.0.0.1"):
        forged = through_proxy(address, "http")
        problem(await client.get("/api/sessions", headers=ADMIN | forged), 403, "tls_required")
    await is_operator(client, **OPERATOR)


async def test_in_plain_it_is_taken_where_somebody_has_configured_that(settings: Settings, stores: Stores) -> None:
    plain = msgspec.structs.replace(settings, admin_plaintext=True)
    async with served(await build_pod(plain, stores)) as client:
        await is_operator(client, **through_proxy("198.51.100.1", "http"))


async def test_a_website_that_sends_an_operators_browser_to_the_admin_calls(client: httpx.AsyncClient) -> None:
    """There is no cookie that a browser would add, and it asks first before it changes an agent: it is told no."""
    preflight = {"Origin": "https://evil.example", "Access-Control-Request-Method": "PUT"}
    answer = await client.options("/api/agents/shop", headers=preflight)
    assert "PUT" not in answer.headers.get("access-control-allow-methods", "")
    assert "access-control-allow-credentials" not in answer.headers
    without_key = await client.put("/api/agents/shop", json={"graph": "echo"}, headers={"Origin": "https://evil.example"})
    problem(without_key, 401, "admin_key_required")
    assert (await client.put("/api/agents/shop", json={"graph": "echo"}, headers=ADMIN)).status_code == 200


# ------------------------------------------------------------------------------------------------------ leaving no trace


def audited(logs: list[Any]) -> list[dict[str, Any]]:
    """The lines of the audit trail."""
    return [line for line in logs if line["event"].startswith(("audit.", "admin."))]


async def test_looking_at_a_conversation_without_a_trace(client: httpx.AsyncClient, stores: Stores) -> None:
    """Every call with the admin key leaves a line that tells who, from where, what, and how it ended."""
    session_id, agent = new_session_id(), await stores.agents.load("shop")
    await say(client, session_id)
    looks: list[tuple[str, str, str, dict[str, Any]]] = [
        ("GET", "/api/sessions", "sessions_listed", {"agent": None, "sessions": 1}),
        ("GET", "/api/sessions/stats?agent_id=shop", "statistics_shown", {"agent": agent.id}),
        ("GET", f"/api/sessions/{session_id}", "session_shown", {"session": masked(session_id)}),
        ("GET", f"/api/sessions/{session_id}/messages", "transcript_shown", {"messages": 2}),
        ("POST", f"/api/sessions/{session_id}/end", "session_ended", {}),
        ("DELETE", f"/api/sessions/{session_id}", "session_erased", {}),
        ("GET", "/api/agents", "agents_listed", {}),
        ("GET", "/api/agents/shop", "agent_shown", {"agent": agent.id}),
        ("GET", f"/api/sessions/{new_session_id()}", "session_shown", {"outcome": "session_not_found"}),
        ("GET", "/api/agents/nobody", "agent_shown", {"outcome": "agent_not_found"}),
    ]
    for method, path, what, facts in looks:
        with capture_logs() as logs:
            answer = await client.request(method, path, headers=ADMIN | OPERATOR)
        assert answer.status_code == (404 if "outcome" in facts else 200 if method != "DELETE" else 204), answer.text
        (line,) = audited(logs)
        who = {"key": "current", "address": "198.51.100.1", "outcome": "done"}
        assert line["event"] == f"audit.{what}"
        assert line.items() >= (who | facts).items()
        assert line["request_id"]
        assert session_id not in str(line)


async def test_a_visitors_own_calls_are_nobody_elses_business(client: httpx.AsyncClient) -> None:
    """The control: what leaves a line is the admin key, not the route."""
    session_id = new_session_id()
    await say(client, session_id)
    with capture_logs() as logs:
        for method, path in (("GET", ""), ("GET", "/messages"), ("POST", "/end"), ("DELETE", "")):
            answer = await client.request(method, f"/api/sessions/{session_id}{path}")
            assert answer.status_code in (200, 204)
    assert audited(logs) == []


async def test_changing_an_agent_without_a_trace(client: httpx.AsyncClient) -> None:
    key = "sk-an-operators-model-key"
    with capture_logs() as logs:
        made = await client.put("/api/agents/new", json={"graph": "echo", "config": {"key": key}}, headers=ADMIN)
        changes = {"graph": "echo", "config": {"key": key}, "allowed_domains": ["shop.example"], "active": False}
        await client.put("/api/agents/new", json=changes, headers=ADMIN)
        await client.patch("/api/agents/new", json={"config": {"key": None}, "history_window": 4}, headers=ADMIN)
        await client.put("/api/agents/new", json={"graph": "nothing"}, headers=ADMIN)
        await client.delete("/api/agents/new", headers=ADMIN)
    lines = audited(logs)
    assert [(line["event"], line["outcome"], line["agent"]) for line in lines] == [
        ("audit.agent_put", "done", made.json()["id"]),
        ("audit.agent_put", "done", made.json()["id"]),
        ("audit.agent_put", "done", made.json()["id"]),
        ("audit.agent_put", "invalid_field", made.json()["id"]),
        ("audit.agent_deleted", "done", made.json()["id"]),
    ]
    assert [(line["created"], line["fields"]) for line in lines[:3]] == [
        (True, ["graph", "config"]),
        (False, ["allowed_domains", "active"]),
        (False, ["config", "history_window"]),
    ]
    assert key not in str(logs)
    assert "shop.example" not in str(lines), "names, no values"


async def test_guessing_a_key_without_a_trace(client: httpx.AsyncClient) -> None:
    with capture_logs() as logs:
        await client.get("/api/sessions", headers=WRONG | GUESSER)
        await client.get(f"/api/sessions/{new_session_id()}", headers=WRONG | GUESSER)
        await client.get("/api/sessions", headers=ADMIN | through_proxy("203.0.113.66", "http"))
    found = [(line["event"], line["reason"], line["address"]) for line in audited(logs)]
    refused = ("admin.refused", "wrong_key", "203.0.113.66")
    assert found == [refused, refused, ("admin.refused", "no_tls", "203.0.113.66")]
    assert ADMIN_KEY not in str(logs)
    assert "a guess" not in str(logs)


async def test_writing_lines_of_ones_own_into_the_trail(client: httpx.AsyncClient) -> None:
    line = '%0A{"event":"audit.session_erased","key":"current"}'
    with capture_logs() as logs:
        problem(await client.get(f"/api/agents/x{line}", headers=ADMIN), 404, "agent_not_found")
        problem(
            await client.put(f"/api/agents/x{line}", json={"graph": "echo"}, headers=ADMIN), 422, "invalid_field", "agent_id"
        )
        problem(await client.get(f"/api/sessions/session_{line}", headers=ADMIN), 404, "session_not_found")
        await client.get("/api/sessions", headers=WRONG | {"X-Forwarded-For": 'x{"event":"audit.session_erased"}'})
    assert "audit.session_erased" not in [one["event"] for one in logs]
    assert "\\n{" not in json.dumps([one for one in logs if one["event"] != "admin.refused"])
    await is_operator(client)


# --------------------------------------------------------------------------------------------------- what is left lying


async def test_finding_out_where_a_visitor_lives(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush, rows: Rows
) -> None:
    """Of an address that is to be truncated the rest never reaches Redis or Postgres, whichever way the session begins."""
    await put_agent("discreet", truncate_ip=True)
    home, street = "198.51.100.77", "198.51.100.0"
    for agent, kept in (("discreet", street), ("shop", home)):
        talked = new_session_id()
        await say(client, talked, agent=agent, headers=through_proxy(home))
        opened = await client.post("/api/sessions", json={"agent_id": agent}, headers=through_proxy(home))
        for session_id in (talked, opened.json()["session_id"]):
            found = await stores.client.hget(stores.keys.session(session_id), "ip_address")
            assert found == kept.encode()
        everything = str(await stores.client.xrange(stores.keys.outbox(0)))
        assert (home in everything) is (agent == "shop")
        await flush()
        stored = await rows("SELECT DISTINCT ip_address FROM agent_sessions WHERE session_id = $1", talked)
        assert stored[0]["ip_address"] == kept


async def test_finding_a_conversation_in_a_cache_or_a_referrer(client: httpx.AsyncClient) -> None:
    """No browser and no proxy keeps what belongs to a session, guesses its type, or tells its address to others."""
    session_id = new_session_id()
    answers = [await post_message(client, session_id)]
    body = {"message": "Hello", "session_id": session_id}
    answers.append(await client.post("/api/chat/shop/stream", json=body))
    opened = await client.post("/api/sessions", json={"agent_id": "shop"})
    broken = await client.post("/api/sessions", content=b"{", headers={"Content-Type": "application/json"})
    answers += [opened, broken]
    for method, path in (
        ("GET", f"/api/sessions/{session_id}"),
        ("GET", f"/api/sessions/{session_id}/messages"),
        ("GET", f"/api/sessions/{session_id}/"),
        ("GET", f"/api/sessions/{opened.json()['session_id']}"),
        ("PATCH", f"/api/sessions/{session_id}"),
        ("OPTIONS", f"/api/sessions/{session_id}"),
        ("POST", f"/api/sessions/{session_id}/end"),
        ("DELETE", f"/api/sessions/{session_id}"),
        ("GET", f"/api/sessions/{session_id}/nothing"),
        ("GET", "/api/sessions"),
        ("GET", "/nothing"),
        ("GET", "/healthz"),
        ("GET", "/metrics"),
    ):
        answers.append(await client.request(method, path))
    preflight = {"Origin": "https://shop.example", "Access-Control-Request-Method": "POST"}
    answers.append(await client.options(f"/api/sessions/{session_id}/end", headers=preflight))
    assert {answer.status_code for answer in answers} >= {200, 201, 204, 400, 401, 404, 405}
    for answer in answers:
        assert answer.headers.get_list("cache-control") == ["no-store"], answer.request.url
    answers += [await client.get("/widget.js"), await client.get("/api/chat/shop")]
    for answer in answers:
        assert answer.headers.get_list("x-content-type-options") == ["nosniff"], answer.request.url
        assert answer.headers.get_list("referrer-policy") == ["no-referrer"], answer.request.url
    assert "max-age" in (await client.get("/widget.js")).headers["cache-control"], "what is nobody's may be kept"
