"""What attackers want of the Origin: to be taken for another website, or for none."""

from typing import Any

import httpx
import pytest

from gateway.access import gatekeeper
from gateway.access.domains import AllowedDomains
from gateway.app import Stores
from persistence.model.agents import Agent
from tests.attacks.conftest import BANK, EVIL, SHOP, at
from tests.conftest import PutAgent
from tests.support.serving import ADMIN
from tests.support.visiting import Flush, Rows, new_session_id, post_message, problem, say

SITE_KEY = "shop-site-key-" + "s" * 32
PREFLIGHT = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "content-type,x-user-token"}
CORS = "access-control-"

CLAIMS = {
    "no website at all": {},
    "a sandboxed frame": {"Origin": "null"},
    "an empty Origin": {"Origin": ""},
    "a user before the host": {"Origin": f"https://{SHOP}@{EVIL}"},
    "a user and a password": {"Origin": f"https://{SHOP}:443@{EVIL}"},
    "the domain before ones own": {"Origin": f"https://{SHOP}.{EVIL}"},
    "the domain behind ones own": {"Origin": f"https://evil{SHOP}"},
    "a domain below it": {"Origin": f"https://{EVIL}.{SHOP}"},
    "the domain as a path": {"Origin": f"https://{EVIL}/{SHOP}"},
    "the domain as a query": {"Origin": f"https://{EVIL}?{SHOP}"},
    "the domain as a fragment": {"Origin": f"https://{EVIL}#{SHOP}"},
    "the domain behind a backslash": {"Origin": f"https://{EVIL}\\{SHOP}"},
    "the domain alone": {"Origin": SHOP},
    "another scheme": {"Origin": f"ftp://{SHOP}"},
    "an extension of the browser": {"Origin": f"chrome-extension://{SHOP}"},
    "two in one": {"Origin": f"https://{SHOP}, https://{EVIL}"},
    "two in one, by a space": {"Origin": f"https://{SHOP} https://{EVIL}"},
    "an empty port": {"Origin": f"https://{SHOP}:"},
    "a port that is none": {"Origin": f"https://{SHOP}:99999"},
    "two dots at the end": {"Origin": f"https://{SHOP}.."},
    "a wildcard": {"Origin": "https://*"},
    "a letter that looks like another": {"Origin": "https://xn--shp-4ed.example"},
    "a referrer in its place": {"Referer": f"https://{SHOP}/"},
    "a forwarded host in its place": {"X-Forwarded-Host": SHOP, "Forwarded": f"host={SHOP}"},
    "the host of the gateway": {"Host": SHOP},
}


@pytest.fixture
async def shop(put_agent: PutAgent) -> Agent:
    """The agent `shop`, for shop.example alone, with a site key."""
    return await put_agent("shop", allowed_domains=(SHOP,), site_keys=(SITE_KEY,))


async def calls(client: httpx.AsyncClient, headers: dict[str, str], session_id: str) -> dict[str, httpx.Response]:
    """Every call that a page makes, in an order in which each has something to find."""
    body = {"message": "Hello", "session_id": session_id, "metadata": {"website_domain": SHOP}}
    minting = {"agent_id": "shop", "metadata": {"website_domain": SHOP}}
    turn = "/api/chat/shop/turns/01900000-0000-7000-8000-000000000000/stream"
    return {
        "available": await client.get(f"/api/chat/shop?website_domain={SHOP}", headers=headers),
        "message": await client.post("/api/chat/shop/message", json=body, headers=headers),
        "stream": await client.post("/api/chat/shop/stream", json=body, headers=headers),
        "resume": await client.get(turn, params={"session_id": session_id}, headers=headers),
        "cancel": await client.post("/api/chat/shop/cancel", json={"session_id": session_id}, headers=headers),
        "mint": await client.post("/api/sessions", json=minting, headers=headers),
        "open": await client.post("/api/sessions", json=minting | {"session_id": session_id}, headers=headers),
        "show": await client.get(f"/api/sessions/{session_id}", headers=headers),
        "messages": await client.get(f"/api/sessions/{session_id}/messages", headers=headers),
        "end": await client.post(f"/api/sessions/{session_id}/end", headers=headers),
        "erase": await client.delete(f"/api/sessions/{session_id}", headers=headers),
    }


NAMES_NO_AGENT = ("show", "messages", "end", "erase")


@pytest.mark.parametrize("claim", CLAIMS)
async def test_being_taken_for_the_shop_by(client: httpx.AsyncClient, chosen: str, claim: str) -> None:
    """On every call, with the id of a visitor of the shop; the page's own word for it in the body is worth nothing."""
    for name, answer in (await calls(client, CLAIMS[claim], chosen)).items():
        expected = (404, "session_not_found") if name in NAMES_NO_AGENT else (403, "domain_not_allowed")
        assert (answer.status_code, answer.json()["code"]) == expected, name
        problem(answer, *expected)
    honest = await calls(client, at(SHOP), chosen)
    assert {name: answer.status_code for name, answer in honest.items()} == {
        "available": 200, "message": 200, "stream": 200, "resume": 404, "cancel": 409, "mint": 201, "open": 200, "show": 200,
        "messages": 200, "end": 200, "erase": 204,
    }  # fmt: skip


async def test_sending_a_second_origin_for_those_who_look_at_the_first_one_only(
    client: httpx.AsyncClient, chosen: str
) -> None:
    for first, second in ((SHOP, EVIL), (EVIL, SHOP), (SHOP, SHOP)):
        headers = [("Origin", f"https://{first}"), ("Origin", f"https://{second}")]
        answer = await client.get(f"/api/sessions/{chosen}", headers=headers)
        problem(answer, 404, "session_not_found")
        body = {"message": "Hello", "session_id": chosen}
        problem(await client.post("/api/chat/shop/message", json=body, headers=headers), 403, "domain_not_allowed")
    assert (await client.get(f"/api/sessions/{chosen}", headers=at(SHOP))).status_code == 200


async def test_without_the_check_any_website_would_be_answered(
    client: httpx.AsyncClient, shop: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: the same call, with a list that is not looked at."""
    problem(await post_message(client, new_session_id(), headers=at(EVIL)), 403, "domain_not_allowed")
    monkeypatch.setattr(AllowedDomains, "allow", lambda self, origin: True)
    assert (await post_message(client, new_session_id(), headers=at(EVIL))).status_code == 200


async def test_coming_without_an_origin_needs_a_token_or_a_key(client: httpx.AsyncClient, minted: dict[str, Any]) -> None:
    body = {"message": "Hello", "session_id": minted["session_id"]}
    for path in ("message", "stream"):
        for key in (minted["session_token"], SITE_KEY):
            headers = {"Authorization": f"Bearer {key}"}
            assert (await client.post(f"/api/chat/shop/{path}", json=body, headers=headers)).status_code == 200
        assert (await client.post(f"/api/chat/shop/{path}", json=body, headers=ADMIN)).status_code == 200
        problem(await client.post(f"/api/chat/shop/{path}", json=body), 401, "session_token_required")
        chosen = body | {"session_id": new_session_id()}
        problem(await client.post(f"/api/chat/shop/{path}", json=chosen), 403, "domain_not_allowed")


async def test_using_a_chosen_id_after_its_website_was_taken_off_the_list(
    client: httpx.AsyncClient, put_agent: PutAgent, chosen: str
) -> None:
    await put_agent("shop", allowed_domains=("new.example",))
    problem(await client.get(f"/api/sessions/{chosen}/messages", headers=at(SHOP)), 404, "session_not_found")
    problem(await post_message(client, chosen, headers=at(SHOP)), 403, "domain_not_allowed")
    problem(await client.get(f"/api/sessions/{chosen}/messages", headers=at("new.example")), 404, "session_not_found")
    await put_agent("shop", allowed_domains=("new.example", SHOP))
    assert (await client.get(f"/api/sessions/{chosen}/messages", headers=at(SHOP))).status_code == 200


async def test_reading_a_websites_sessions_from_another_port_of_it(
    client: httpx.AsyncClient, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent("shop", allowed_domains=("shop.example:8443",))
    session_id = new_session_id()
    right, wrong = {"Origin": "https://shop.example:8443"}, at(SHOP)
    await say(client, session_id, headers=right)
    problem(await post_message(client, session_id, headers=wrong), 403, "domain_not_allowed")
    problem(await client.get(f"/api/sessions/{session_id}", headers=wrong), 404, "session_not_found")
    assert (await client.get(f"/api/sessions/{session_id}", headers=right)).json()["website_domain"] == SHOP
    await flush()
    assert [row[0] for row in await rows("SELECT website_domain FROM agent_sessions")] == [SHOP], "the host alone"


async def test_smuggling_a_domain_into_what_is_stored(
    client: httpx.AsyncClient, anywhere: Agent, flush: Flush, rows: Rows
) -> None:
    for origin in (f"https://{EVIL}", "null", "nonsense"):
        metadata = {"website_domain": BANK}
        await say(client, new_session_id(), agent="anywhere", headers={"Origin": origin}, metadata=metadata)
    await say(client, new_session_id(), agent="anywhere", metadata={"website_domain": "Bank.EXAMPLE."})
    await flush()
    found = [row[0] for row in await rows("SELECT website_domain FROM agent_sessions ORDER BY started_at")]
    assert found == [EVIL, "null", "null", BANK]


async def test_reading_from_a_sandboxed_frame_what_was_said_on_a_website(client: httpx.AsyncClient, anywhere: Agent) -> None:
    session_id, framed = new_session_id(), new_session_id()
    await say(client, session_id, agent="anywhere", headers=at(SHOP))
    await say(client, framed, agent="anywhere", headers={"Origin": "null"})
    path = "/api/sessions/{}/messages"
    problem(await client.get(path.format(session_id), headers={"Origin": "null"}), 404, "session_not_found")
    problem(await client.get(path.format(framed), headers=at(SHOP)), 404, "session_not_found")
    assert (await client.get(path.format(framed), headers={"Origin": "null"})).status_code == 200


ENTRIES = [
    "https://shop.example",
    "shop.example/chat",
    "*",
    "*.*.example",
    "shop.*",
    "shop.example:x",
    "a b",
    "null",
    "1.2.3",
    "",
]


async def test_letting_a_mistyped_list_shut_everybody_out(client: httpx.AsyncClient, shop: Agent) -> None:
    for entry in ENTRIES:
        body = {"graph": "echo", "allowed_domains": [SHOP, entry]}
        answer = await client.put("/api/agents/shop", json=body, headers=ADMIN)
        assert answer.status_code == 422, entry
        assert answer.json()["field"].startswith("allowed_domains"), entry
    honest = {"graph": "echo", "allowed_domains": ["B\u00fccher.example", "*.shop.example", "localhost:8080", "[::1]:8080"]}
    assert (await client.put("/api/agents/shop", json=honest, headers=ADMIN)).status_code == 200
    for origin in ("https://xn--bcher-kva.example", "https://a.shop.example", "http://localhost:8080", "http://[::1]:8080"):
        await say(client, new_session_id(), headers={"Origin": origin})


async def test_a_list_is_made_ready_once_and_not_for_each_call(
    client: httpx.AsyncClient, shop: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []

    class Counted(AllowedDomains):
        def __init__(self, entries: Any) -> None:
            made.append(entries)
            super().__init__(entries)

    monkeypatch.setattr(gatekeeper, "AllowedDomains", Counted)
    for _ in range(3):
        await say(client, new_session_id(), headers=at(SHOP))
    assert made == [(SHOP,)]


# ----------------------------------------------------------------------------------------------------------------- CORS


def cors(answer: httpx.Response) -> dict[str, str]:
    return {name.removeprefix(CORS): value for name, value in answer.headers.items() if name.startswith(CORS)}


async def test_reading_answers_in_a_page_of_another_website(client: httpx.AsyncClient, chosen: str) -> None:
    """What a browser lets a page read: of an agent's answers those of its own websites, problems included."""
    path, body = "/api/chat/shop/message", {"message": "Hello", "session_id": chosen}
    exposed = "Retry-After, RateLimit, RateLimit-Policy"
    readable = {"allow-origin": f"https://{SHOP}", "expose-headers": exposed}
    for honest in (body, body | {"session_id": "short"}, {}):
        assert cors(await client.post(path, json=honest, headers=at(SHOP))) == readable
    assert cors(await client.post(path, content="{", headers=at(SHOP))) == readable
    assert cors(await client.get(path, headers=at(SHOP))) == readable, "also what the router refuses"
    for origin in (EVIL, f"{SHOP}.{EVIL}"):
        for stolen in (body, {}):
            answer = await client.post(path, json=stolen, headers=at(origin))
            assert cors(answer) == {}
            assert "Origin" in answer.headers["vary"]
    assert cors(await client.post(path, json=body, headers={"Origin": "null"})) == {}
    assert "Origin" in (await client.post(path, json=body)).headers["vary"], "no cache gives a page what another one got"


async def test_a_page_reads_why_there_is_no_chat_on_it(client: httpx.AsyncClient, shop: Agent) -> None:
    """The widget of a website that is not allowed says so in the console: that one answer any page may read."""
    answer = await client.get("/api/chat/shop", headers=at(EVIL))
    problem(answer, 403, "domain_not_allowed")
    assert cors(answer)["allow-origin"] == f"https://{EVIL}"
    assert cors(await client.get("/api/chat/nobody", headers=at(EVIL)))["allow-origin"] == f"https://{EVIL}"
    unknown = await client.post("/api/chat/nobody/message", json={}, headers=at(EVIL))
    problem(unknown, 404, "agent_not_found")
    assert cors(unknown)["allow-origin"] == f"https://{EVIL}"


async def test_preflights_are_answered_for_the_agents_websites(client: httpx.AsyncClient, shop: Agent) -> None:
    path = "/api/chat/shop/stream"
    answer = await client.options(path, headers=at(SHOP) | PREFLIGHT)
    assert answer.status_code == 204
    allowed = cors(answer)
    assert allowed["allow-origin"] == f"https://{SHOP}"
    assert int(allowed["max-age"]) > 0
    assert {"GET", "POST", "DELETE"} <= set(allowed["allow-methods"].split(", "))
    assert {"Authorization", "Content-Type", "X-User-Token", "Last-Event-ID"} <= set(allowed["allow-headers"].split(", "))
    refused = await client.options(path, headers=at(EVIL) | PREFLIGHT)
    problem(refused, 403, "domain_not_allowed")
    assert cors(refused) == {}
    for anybodys in ("/api/chat/shop", "/api/chat/nobody/stream", "/api/sessions", f"/api/sessions/{new_session_id()}/end"):
        answer = await client.options(anybodys, headers=at(EVIL) | PREFLIGHT)
        assert (answer.status_code, cors(answer)["allow-origin"]) == (204, f"https://{EVIL}")


async def test_getting_a_browser_to_send_cookies_or_to_read_what_is_for_operators(
    client: httpx.AsyncClient, chosen: str, anywhere: Agent
) -> None:
    for headers in (at(SHOP), at(EVIL), {"Origin": "null"}, {"Origin": "*"}, {"Origin": "nonsense"}):
        for method, path in (
            ("GET", "/api/chat/anywhere"),
            ("GET", f"/api/sessions/{chosen}"),
            ("OPTIONS", "/api/chat/anywhere/message"),
            ("GET", "/api/agents"),
            ("GET", "/metrics"),
            ("GET", "/nothing"),
        ):
            answer = await client.request(method, path, headers=headers | PREFLIGHT)
            assert "allow-credentials" not in cors(answer), (path, headers)
            assert cors(answer).get("allow-origin") in (None, headers["Origin"]), (path, headers)
            assert cors(answer).get("allow-origin") != "*", (path, headers)
            if path in ("/api/agents", "/metrics", "/nothing"):
                assert cors(answer) == {}, path
    assert cors(await client.get("/widget.js", headers=at(EVIL)))["allow-origin"] == "*", "modules are for every page"


async def test_a_page_can_read_that_something_went_wrong_in_the_gateway(
    client: httpx.AsyncClient, shop: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("a defect")

    monkeypatch.setattr(gatekeeper.Gatekeeper, "access", fail)
    answer = await post_message(client, new_session_id(), headers=at(SHOP))
    problem(answer, 500, "internal_error")
    assert cors(answer)["allow-origin"] == f"https://{SHOP}"
    assert "a defect" not in answer.text


async def test_a_page_can_read_that_redis_is_away(client: httpx.AsyncClient, shop: Agent, stores: Stores) -> None:
    await say(client, new_session_id(), headers=at(SHOP))
    await stores.client.config_set("maxmemory", "1")
    try:
        answer = await post_message(client, new_session_id(), headers=at(SHOP))
    finally:
        await stores.client.config_set("maxmemory", "0")
    assert answer.status_code == 503
    assert cors(answer)["allow-origin"] == f"https://{SHOP}"
