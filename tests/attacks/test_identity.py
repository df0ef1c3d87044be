"""What attackers want of other people's sessions: each refused with its code, and the honest call beside it answered."""

from base64 import urlsafe_b64encode
from collections.abc import Callable, Sequence
from time import time
from typing import Any

import httpx
import jwt
import pytest
from structlog.testing import capture_logs

from gateway.access.admin_key import FAILURES
from gateway.access.tokens import SessionToken, SessionTokens
from gateway.app import Stores
from persistence.model.agents import Agent
from tests.attacks.conftest import BANK, EVIL, SHOP, at
from tests.conftest import PutAgent
from tests.support.serving import ADMIN, SECRET_KEY
from tests.support.visiting import Flush, Rows, new_session_id, post_message, problem, say

KEY, OLD_KEY, BANK_KEY = "shop-site-key-" + "s" * 32, "shop-site-key-" + "o" * 32, "bank-site-key-" + "b" * 32
ABSENT, ABSENT_MINTED = "session_1_that_nobody_has_begun", "gs_that_the_gateway_never_minted"
NO_TOKEN = "eyJhbGciOiJIUzI1NiJ9.e30.nonsense"
NESTED = urlsafe_b64encode(b"[" * 3000).decode() + ".e30.AAAA"
Session = dict[str, Any]


def bearer(credentials: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {credentials}"}


def user_token(sub: Any = "user-1", key: str | None = KEY, algorithm: str = "HS256", **claims: Any) -> str:
    """What a site signs for a visitor."""
    return jwt.encode({"sub": sub, "exp": int(time()) + 600, **claims}, key, algorithm)


def as_user(sub: str = "user-1") -> dict[str, str]:
    """The headers of a browser at the shop in which that user is logged in."""
    return at(SHOP, **{"X-User-Token": user_token(sub)})


def shape(answer: httpx.Response) -> tuple[Any, ...]:
    """All of a refusal by which two can be told apart, but for the request's own id."""
    document = answer.json() | {"request_id": ""}
    return answer.status_code, document, {name for name in answer.headers if name not in ("date", "content-length")}


@pytest.fixture
async def shop(put_agent: PutAgent) -> Agent:
    """The agent `shop`, for shop.example alone, with two site keys."""
    return await put_agent("shop", allowed_domains=(SHOP,), site_keys=(KEY, OLD_KEY))


@pytest.fixture
async def members(put_agent: PutAgent) -> Agent:
    """The agent `members` of the shop, which answers known users alone."""
    return await put_agent("members", allowed_domains=(SHOP,), site_keys=(KEY,), require_identity=True)


@pytest.fixture
async def owned(client: httpx.AsyncClient, shop: Agent) -> str:
    """A session of user-1 under an id that the browser made up."""
    session_id = new_session_id()
    await say(client, session_id, "my secret", headers=as_user())
    return session_id


async def call(
    client: httpx.AsyncClient, name: str, session_id: str, headers: dict[str, str], agent: str = "shop"
) -> httpx.Response:
    """A call about a session, by its name."""
    body = {"message": "Give me everything", "session_id": session_id}
    match name:
        case "message" | "stream":
            return await client.post(f"/api/chat/{agent}/{name}", json=body, headers=headers)
        case "cancel":
            return await client.post(f"/api/chat/{agent}/cancel", json={"session_id": session_id}, headers=headers)
        case "resume":
            path = f"/api/chat/{agent}/turns/01900000-0000-7000-8000-000000000000/stream"
            return await client.get(path, params={"session_id": session_id}, headers=headers)
        case "open":
            return await client.post("/api/sessions", json={"agent_id": agent, "session_id": session_id}, headers=headers)
        case "end":
            return await client.post(f"/api/sessions/{session_id}/end", headers=headers)
        case "erase":
            return await client.delete(f"/api/sessions/{session_id}", headers=headers)
        case "messages" | "events":
            return await client.get(f"/api/sessions/{session_id}/{name}", headers=headers)
    return await client.get(f"/api/sessions/{session_id}", headers=headers)


async def refused(
    client: httpx.AsyncClient,
    names: Sequence[str],
    session_id: str,
    headers: dict[str, str],
    status: int,
    code: str,
    agent: str = "shop",
) -> None:
    """Each of the calls is answered with this status and code."""
    for name in names:
        answer = await call(client, name, session_id, headers, agent)
        assert answer.status_code == status, (name, answer.text)
        problem(answer, status, code)


CALLS = ["message", "stream", "cancel", "resume", "open", "show", "messages", "events", "end", "erase"]
OF_AN_AGENT = ["message", "stream", "cancel", "resume", "open"]
OF_A_SESSION = ["show", "messages", "events", "end", "erase"]
WITHOUT_BEGINNING = [name for name in CALLS if name not in ("message", "stream", "open")]
HARMLESS = ["message", "open", "show", "messages", "end"]


# ------------------------------------------------------------------------------------------------ sessions of other people


async def test_using_another_sites_session_by_its_id(client: httpx.AsyncClient, anywhere: Agent) -> None:
    session_id = new_session_id()
    await say(client, session_id, "my secret", agent="anywhere", headers=at(SHOP))
    await refused(client, CALLS, session_id, at(EVIL), 404, "session_not_found", agent="anywhere")
    assert (await call(client, "messages", session_id, at(SHOP))).json()["messages"][0]["content"] == "my secret"


async def test_using_a_minted_session_without_its_token(client: httpx.AsyncClient, minted: Session) -> None:
    await refused(client, CALLS, minted["session_id"], at(SHOP), 401, "session_token_required")
    honest = at(SHOP, **bearer(minted["session_token"]))
    assert (await call(client, "messages", minted["session_id"], honest)).status_code == 200


async def test_using_a_session_with_the_token_of_ones_own(client: httpx.AsyncClient, minted: Session) -> None:
    mine = (await client.post("/api/sessions", json={"agent_id": "shop"}, headers=at(SHOP))).json()
    thief = at(SHOP, **bearer(mine["session_token"]))
    await refused(client, CALLS, minted["session_id"], thief, 401, "session_token_invalid")
    assert (await call(client, "show", mine["session_id"], thief)).status_code == 200


async def test_naming_a_victims_session_in_the_body_and_ones_own_in_the_path(
    client: httpx.AsyncClient, chosen: str, shop: Agent
) -> None:
    mine = new_session_id()
    turn_id = (await say(client, mine, headers=at(SHOP)))["metadata"]["turn_id"]
    theirs = (await call(client, "messages", chosen, at(SHOP))).json()["messages"][0]["turn_id"]
    path = "/api/chat/shop/turns/{}/stream"
    answer = await client.get(path.format(theirs), params={"session_id": mine}, headers=at(SHOP))
    problem(answer, 404, "turn_not_found")
    honest = await client.get(path.format(turn_id), params={"session_id": mine}, headers=at(SHOP))
    assert honest.status_code == 200


async def test_reaching_a_session_through_another_agent(client: httpx.AsyncClient, anywhere: Agent, chosen: str) -> None:
    await refused(client, OF_AN_AGENT, chosen, at(SHOP), 404, "session_not_found", agent="anywhere")
    assert (await call(client, "message", chosen, at(SHOP))).status_code == 200


async def test_using_a_token_at_another_agent(client: httpx.AsyncClient, anywhere: Agent, minted: Session) -> None:
    headers = at(SHOP, **bearer(minted["session_token"]))
    await refused(client, OF_AN_AGENT, minted["session_id"], headers, 401, "session_token_invalid", agent="anywhere")
    assert (await call(client, "message", minted["session_id"], headers)).status_code == 200


async def test_using_a_stolen_token_on_another_website(client: httpx.AsyncClient, anywhere: Agent) -> None:
    opened = (await client.post("/api/sessions", json={"agent_id": "anywhere"}, headers=at(SHOP))).json()
    for origin in (f"https://{EVIL}", "null"):
        stolen = {"Origin": origin, **bearer(opened["session_token"])}
        await refused(client, CALLS, opened["session_id"], stolen, 404, "session_not_found", agent="anywhere")
    honest = at(SHOP, **bearer(opened["session_token"]))
    assert (await call(client, "show", opened["session_id"], honest)).status_code == 200


# ------------------------------------------------------------------------------------------------------- forged tokens


def claims_of(session: Session, agent: Agent, **changed: Any) -> dict[str, Any]:
    return {"sid": session["session_id"], "aid": agent.id, "dom": SHOP, "exp": int(time()) + 600} | changed


def signed(claims: dict[str, Any], key: str | None = SECRET_KEY, algorithm: str = "HS256", **header: str) -> str:
    return jwt.encode(claims, key, algorithm, header)


FORGED: dict[str, Callable[[dict[str, Any]], str]] = {
    "replaying an expired one": lambda claims: signed(claims | {"exp": int(time()) - 1}),
    "signing with alg none": lambda claims: signed(claims, None, "none"),
    "guessing the key": lambda claims: signed(claims, "g" * 32),
    "another algorithm": lambda claims: signed(claims, SECRET_KEY * 2, "HS512"),
    "naming a key of ones own": lambda claims: signed(claims, kid="../../dev/null"),
    "living for ever": lambda claims: signed({**claims, "exp": None}),
    "no end": lambda claims: signed({name: claims[name] for name in ("sid", "aid", "dom")}),
    "another session's claims": lambda claims: signed(claims | {"sid": ABSENT}),
    "confusing types": lambda claims: signed(claims | {"sid": [claims["sid"]]}),
    "signing with a site key": lambda claims: signed(claims, KEY),
    "a token that is too long": lambda claims: "W" * 6_000 + ".e30.",
    "a header nested without end": lambda claims: NESTED,
    "a user token for a session token": lambda claims: user_token(claims["sid"]),
}


@pytest.mark.parametrize("forgery", FORGED)
async def test_forging_a_session_token(client: httpx.AsyncClient, shop: Agent, minted: Session, forgery: str) -> None:
    forged = FORGED[forgery](claims_of(minted, shop))
    await refused(client, CALLS, minted["session_id"], at(SHOP, **bearer(forged)), 401, "session_token_invalid")
    honest = jwt.encode(claims_of(minted, shop), SECRET_KEY, "HS256")
    assert (await call(client, "show", minted["session_id"], at(SHOP, **bearer(honest)))).status_code == 200


async def test_changing_the_claims_of_a_good_token(client: httpx.AsyncClient, shop: Agent, minted: Session) -> None:
    other = (await client.post("/api/sessions", json={"agent_id": "shop"}, headers=at(SHOP))).json()
    head, _, signature = minted["session_token"].split(".")
    spliced = ".".join((head, other["session_token"].split(".")[1], signature))
    problem(await call(client, "show", other["session_id"], at(SHOP, **bearer(spliced))), 401, "session_token_invalid")
    honest = at(SHOP, **bearer(other["session_token"]))
    assert (await call(client, "show", other["session_id"], honest)).status_code == 200


async def test_bringing_an_erased_session_back_with_its_token(
    client: httpx.AsyncClient, minted: Session, flush: Flush, rows: Rows
) -> None:
    headers = at(SHOP, **bearer(minted["session_token"]))
    assert (await call(client, "message", minted["session_id"], headers)).status_code == 200
    assert (await call(client, "erase", minted["session_id"], headers)).status_code == 204
    await flush()
    await refused(client, CALLS, minted["session_id"], headers, 404, "session_not_found")
    await flush()
    assert await rows("SELECT id FROM agent_sessions") == []


# ------------------------------------------------------------------------------------------------------------ guessing ids


async def test_learning_whether_a_session_exists_from_how_a_stranger_is_refused(
    client: httpx.AsyncClient, anywhere: Agent, owned: str, minted: Session
) -> None:
    """Whoever comes from elsewhere, or as somebody else, is told the same of a session that is there and of none."""
    of_another_site = new_session_id()
    await say(client, of_another_site, agent="anywhere", headers=at(SHOP))
    strangers = [
        (of_another_site, "anywhere", at(EVIL)),
        (of_another_site, "anywhere", at("null")),
        (of_another_site, "anywhere", at(EVIL, **bearer(NO_TOKEN))),
        (owned, "shop", at(SHOP)),
        (owned, "shop", as_user("user-2")),
        (owned, "shop", at(SHOP, **bearer(NO_TOKEN))),
    ]
    for session_id, agent, headers in strangers:
        for name in WITHOUT_BEGINNING:
            there = await call(client, name, session_id, headers, agent)
            assert 400 <= there.status_code < 500
            assert shape(there) == shape(await call(client, name, ABSENT, headers, agent)), (name, headers)
    for headers in (at(SHOP), at(EVIL), {}, at(SHOP, **bearer(NO_TOKEN)), as_user("user-2")):
        for name in CALLS:
            there = await call(client, name, minted["session_id"], headers)
            assert 400 <= there.status_code < 500
            assert shape(there) == shape(await call(client, name, ABSENT_MINTED, headers)), (name, headers)


async def test_learning_from_a_bad_user_token_whether_a_users_session_exists(client: httpx.AsyncClient, owned: str) -> None:
    headers = at(SHOP, **{"X-User-Token": "a.b.c"})
    for name in OF_A_SESSION:
        there = await call(client, name, owned, headers)
        problem(there, 404, "session_not_found")
        assert shape(there) == shape(await call(client, name, ABSENT, headers)), name
    expired = at(SHOP, **{"X-User-Token": user_token(exp=int(time()) - 60)})
    await refused(client, CALLS, owned, expired, 401, "user_token_invalid")
    assert (await call(client, "show", owned, as_user())).status_code == 200


async def test_learning_that_a_session_existed_before_it_was_erased(
    client: httpx.AsyncClient, anywhere: Agent, owned: str
) -> None:
    of_another_site = new_session_id()
    await say(client, of_another_site, agent="anywhere", headers=at(SHOP))
    for session_id in (of_another_site, owned):
        assert (await client.delete(f"/api/sessions/{session_id}", headers=ADMIN)).status_code == 204
    for session_id, agent, headers in ((of_another_site, "anywhere", at(EVIL)), (owned, "shop", as_user("user-2"))):
        for name in WITHOUT_BEGINNING:
            there = await call(client, name, session_id, headers, agent)
            assert shape(there) == shape(await call(client, name, ABSENT, headers, agent)), name


async def test_taking_an_id_that_others_can_guess(client: httpx.AsyncClient, shop: Agent) -> None:
    for session_id in ("short", "a" * 15, "session_1", "1", "x" * 256):
        problem(await post_message(client, session_id, headers=at(SHOP)), 422, "invalid_field", "session_id")
        body = {"agent_id": "shop", "session_id": session_id}
        problem(await client.post("/api/sessions", json=body, headers=at(SHOP)), 422, "invalid_field", "session_id")
        problem(await client.get(f"/api/sessions/{session_id}", headers=at(SHOP)), 404, "session_not_found")
    assert (await post_message(client, "a" * 16, headers=at(SHOP))).status_code == 200


async def test_taking_an_id_of_the_gateways_own_kind(client: httpx.AsyncClient, shop: Agent) -> None:
    await refused(client, CALLS, ABSENT_MINTED, at(SHOP), 401, "session_token_required")
    for name in ("message", "stream", "open"):
        assert (await call(client, name, new_session_id(), at(SHOP))).is_success


async def test_coming_with_an_id_of_ones_own_where_minted_ones_are_required(
    client: httpx.AsyncClient, shop: Agent, put_agent: PutAgent, chosen: str
) -> None:
    """Also with one from before they were."""
    await put_agent("shop", allowed_domains=(SHOP,), require_token=True)
    for session_id in (chosen, ABSENT):
        await refused(client, [name for name in CALLS if name != "open"], session_id, at(SHOP), 404, "session_not_found")
        await refused(client, ["open"], session_id, at(SHOP), 401, "session_token_required")
    opened = (await client.post("/api/sessions", json={"agent_id": "shop"}, headers=at(SHOP))).json()
    headers = at(SHOP, **bearer(opened["session_token"]))
    assert (await call(client, "message", opened["session_id"], headers)).status_code == 200
    found = await call(client, "open", opened["session_id"], headers)
    assert (found.status_code, found.json()["session_id"]) == (200, opened["session_id"])


# ---------------------------------------------------------------------------------------------------------- other users


@pytest.mark.parametrize("thief", ["anonymous", "another user", "with an anonymous session token"])
async def test_using_another_users_session(client: httpx.AsyncClient, shop: Agent, thief: str) -> None:
    session_id = new_session_id()
    early = (await call(client, "open", session_id, at(SHOP))).json()["session_token"]
    await say(client, session_id, "my secret", headers=as_user())
    headers = {
        "anonymous": at(SHOP),
        "another user": as_user("user-2"),
        "with an anonymous session token": at(SHOP, **bearer(early)),
    }[thief]
    await refused(client, CALLS, session_id, headers, 404, "session_not_found")
    for name in HARMLESS:
        assert (await call(client, name, session_id, as_user())).is_success


async def test_turning_a_users_session_into_ones_own_by_logging_in(
    client: httpx.AsyncClient, owned: str, flush: Flush, rows: Rows
) -> None:
    problem(await post_message(client, owned, headers=as_user("user-2")), 404, "session_not_found")
    problem(await post_message(client, owned, headers=at(SHOP), user_token=user_token("user-2")), 404, "session_not_found")
    await say(client, owned, headers=as_user())
    await flush()
    assert [row[0] for row in await rows("SELECT external_user_id FROM agent_sessions")] == ["user-1"]


async def test_being_somebody_by_saying_so(client: httpx.AsyncClient, shop: Agent, flush: Flush, rows: Rows) -> None:
    """A `user_id` that nobody signed is a note of the page's, and no more."""
    metadata = {"user_id": "01900000-0000-7000-8000-00000000aaaa", "sub": "user-1"}
    session_id = new_session_id()
    await say(client, session_id, headers=at(SHOP), metadata=metadata)
    problem(
        await post_message(client, new_session_id(), headers=at(SHOP), user_id="user-1"), 422, "invalid_field", "user_id"
    )
    body = {"agent_id": "shop", "user_id": "user-1"}
    problem(await client.post("/api/sessions", json=body, headers=at(SHOP)), 422, "invalid_field", "user_id")
    await flush()
    assert [tuple(row) for row in await rows("SELECT user_id, external_user_id FROM agent_sessions")] == [(None, None)]
    assert (await call(client, "show", session_id, at(SHOP))).json()["user_id"] is None


async def test_being_two_users_at_once(client: httpx.AsyncClient, owned: str) -> None:
    """One in the header, another one in the body: neither is taken."""
    answer = await post_message(client, owned, headers=as_user("user-2"), user_token=user_token("user-1"))
    problem(answer, 401, "user_token_invalid")
    assert (await post_message(client, owned, headers=as_user(), user_token=as_user()["X-User-Token"])).status_code == 200


async def test_using_ones_own_session_token_as_another_user(client: httpx.AsyncClient, shop: Agent) -> None:
    opened = (
        await client.post("/api/sessions", json={"agent_id": "shop", "user_token": user_token()}, headers=at(SHOP))
    ).json()
    token = bearer(opened["session_token"])
    await refused(client, CALLS, opened["session_id"], as_user("user-2") | token, 404, "session_not_found")
    for name in HARMLESS:
        assert (await call(client, name, opened["session_id"], at(SHOP, **token))).is_success, "the token names its user"


A_SESSION_TOKEN = SessionTokens([SECRET_KEY], 12 * 3600).mint(SessionToken("user-1", "an agent", SHOP, "user-1"))
USER_TOKENS: dict[str, Callable[[], str]] = {
    "forging it without a key": lambda: user_token(key=None, algorithm="none"),
    "forging it with a key of ones own": lambda: user_token(key="m" * 40),
    "signing it with another site's key": lambda: user_token(key=BANK_KEY),
    "signing it with the gateway's key": lambda: user_token(key=SECRET_KEY),
    "another algorithm": lambda: user_token(key=KEY * 2, algorithm="HS512"),
    "replaying an expired one": lambda: user_token(exp=int(time()) - 120),
    "one that lasts for years": lambda: user_token(exp=int(time()) + 10**8),
    "one without an end": lambda: jwt.encode({"sub": "user-1"}, KEY, "HS256"),
    "one for another service": lambda: user_token(aud="https://mail.example"),
    "one of nobody": lambda: user_token(""),
    "a number for a name": lambda: user_token(1),
    "poisoning the outbox with a NUL": lambda: user_token("user\0-1"),
    "poisoning the outbox with a surrogate": lambda: user_token("\ud800"),
    "a session token for a user token": lambda: A_SESSION_TOKEN,
    "nonsense": lambda: "nonsense",
    "nothing": lambda: "",
    "nesting without end": lambda: NESTED,
}  # fmt: skip


@pytest.mark.parametrize("forged", USER_TOKENS)
async def test_forging_a_user_token(
    client: httpx.AsyncClient, shop: Agent, bank: Agent, stores: Stores, forged: str
) -> None:
    token = USER_TOKENS[forged]()
    body = {"agent_id": "shop", "user_token": token}
    problem(await client.post("/api/sessions", json=body, headers=at(SHOP)), 401, "user_token_invalid")
    session_id = new_session_id()
    for headers, fields in ((at(SHOP), {"user_token": token}), (at(SHOP, **{"X-User-Token": token}), {})):
        answer = await post_message(client, session_id, headers=headers, **fields)
        problem(answer, 401, "user_token_invalid")
        assert token not in answer.text or not token
    assert not await stores.client.exists(stores.keys.session(session_id))
    for key in (KEY, OLD_KEY):
        await say(client, session_id, headers=at(SHOP), user_token=user_token(key=key))


async def test_going_on_with_a_token_whose_key_was_withdrawn(
    client: httpx.AsyncClient, put_agent: PutAgent, owned: str
) -> None:
    stale = at(SHOP, **{"X-User-Token": user_token(key=OLD_KEY)})
    assert (await call(client, "message", owned, stale)).status_code == 200
    await put_agent("shop", allowed_domains=(SHOP,), site_keys=(KEY,))
    problem(await call(client, "message", owned, stale), 401, "user_token_invalid")
    assert (await call(client, "message", owned, as_user())).status_code == 200


async def test_talking_to_an_agent_of_known_users_without_being_one(client: httpx.AsyncClient, members: Agent) -> None:
    session_id = new_session_id()
    await say(client, session_id, agent="members", headers=as_user())
    for one in (session_id, ABSENT):
        await refused(client, OF_AN_AGENT, one, at(SHOP), 401, "identity_required", agent="members")
        await refused(client, OF_A_SESSION, one, at(SHOP), 404, "session_not_found", agent="members")
    assert (await call(client, "show", session_id, as_user())).status_code == 200


async def test_minting_a_session_of_nobody_where_users_must_be_known(client: httpx.AsyncClient, members: Agent) -> None:
    body: dict[str, Any] = {"agent_id": "members"}
    problem(await client.post("/api/sessions", json=body, headers=at(SHOP)), 401, "identity_required")
    answer = await client.post("/api/sessions", json=body | {"user_token": user_token()}, headers=at(SHOP))
    headers = at(SHOP, **bearer(answer.json()["session_token"]))
    assert (await call(client, "message", answer.json()["session_id"], headers, "members")).status_code == 200
    assert (await call(client, "show", answer.json()["session_id"], headers)).json()["user_id"] == "user-1"


async def test_going_on_with_an_anonymous_session_where_users_must_be_known_from_now_on(
    client: httpx.AsyncClient, put_agent: PutAgent, chosen: str, minted: Session
) -> None:
    await put_agent("shop", allowed_domains=(SHOP,), site_keys=(KEY,), require_identity=True)
    problem(await call(client, "message", chosen, at(SHOP)), 401, "identity_required")
    problem(await call(client, "messages", chosen, at(SHOP)), 404, "session_not_found")
    anonymous = at(SHOP, **bearer(minted["session_token"]))
    problem(await call(client, "message", minted["session_id"], anonymous), 401, "identity_required")
    assert (await call(client, "message", chosen, as_user())).status_code == 200
    assert (await call(client, "message", minted["session_id"], as_user() | anonymous)).status_code == 200


@pytest.mark.parametrize(
    ("sub", "columns"),
    [
        ("01900000-0000-7000-8000-00000000aaaa", ("01900000-0000-7000-8000-00000000aaaa", None)),
        ("01900000-0000-7000-8000-00000000AAAA", (None, "01900000-0000-7000-8000-00000000AAAA")),
        ("customer-4711", (None, "customer-4711")),
    ],
)
async def test_losing_ones_identity_by_waiting_until_the_session_has_left_redis(
    client: httpx.AsyncClient,
    shop: Agent,
    stores: Stores,
    flush: Flush,
    rows: Rows,
    sub: str,
    columns: tuple[str | None, ...],
) -> None:
    """A login in mid-session reaches Postgres, also when nothing came of the turn, and comes back from there."""
    session_id = new_session_id()
    await say(client, session_id, headers=at(SHOP))
    await flush()
    assert (
        await client.post("/api/sessions", json={"agent_id": "shop", "session_id": session_id}, headers=as_user(sub))
    ).is_success
    await flush()
    found = await rows("SELECT user_id::text, external_user_id FROM agent_sessions")
    assert [tuple(row) for row in found] == [columns]
    await stores.client.delete(stores.keys.session(session_id))
    problem(await call(client, "messages", session_id, as_user("user-2")), 404, "session_not_found")
    assert len((await call(client, "messages", session_id, as_user(sub))).json()["messages"]) == 2


# ------------------------------------------------------------------------------------------------------------- site keys


async def test_using_a_site_key_at_another_sites_agent(client: httpx.AsyncClient, put_agent: PutAgent, owned: str) -> None:
    await put_agent("bank", allowed_domains=(BANK,), site_keys=(BANK_KEY,))
    await refused(client, CALLS, owned, bearer(BANK_KEY), 401, "session_token_invalid")
    for name in HARMLESS:
        assert (await call(client, name, owned, bearer(KEY))).is_success


async def test_a_sites_server_speaks_for_its_own_website(
    client: httpx.AsyncClient, shop: Agent, owned: str, flush: Flush, rows: Rows
) -> None:
    """The honest use of a site key: without an Origin, with the website in the metadata, on any session of the agent."""
    metadata = {"website_domain": SHOP}
    session_id = new_session_id()
    await say(client, session_id, headers=bearer(KEY), metadata=metadata)
    assert (await call(client, "message", session_id, at(SHOP))).status_code == 200, "and the visitor goes on in a browser"
    assert (await call(client, "messages", owned, bearer(OLD_KEY))).status_code == 200
    await flush()
    assert {row[0] for row in await rows("SELECT website_domain FROM agent_sessions")} == {SHOP}


async def test_guessing_a_site_key(client: httpx.AsyncClient, owned: str) -> None:
    """What is neither a token nor the agent's key may be the admin key, so guesses at it are counted as such."""
    for key in (KEY[:-1], KEY + "x", KEY.upper(), "sha256:" + "0" * 12, "x" * 40):
        await refused(client, ["message"], owned, bearer(key), 401, "session_token_invalid")
    for name in HARMLESS:
        assert (await call(client, name, owned, bearer(KEY))).is_success


async def test_a_site_that_asks_for_sessions_that_are_gone_is_no_guesser(client: httpx.AsyncClient, owned: str) -> None:
    """Its server may clear up after its users: a session that is not there is no agent's; its key is no guess."""
    assert (await call(client, "messages", owned, bearer(KEY))).status_code == 200
    for _ in range(FAILURES + 1):
        answer = await client.get(f"/api/sessions/{new_session_id()}", headers=bearer(KEY))
        problem(answer, 404, "session_not_found")
    assert (await client.get("/api/agents", headers=ADMIN)).status_code == 200, "nobody is shut out"
    # What no site has is a guess, there as elsewhere.
    for _ in range(FAILURES):
        answer = await client.get(f"/api/sessions/{new_session_id()}", headers=bearer(KEY + "x"))
        problem(answer, 401, "session_token_invalid")
    problem(await client.get(f"/api/sessions/{new_session_id()}", headers=bearer(KEY + "x")), 429, "rate_limited")


async def test_reading_site_keys_from_the_list_of_agents(client: httpx.AsyncClient, shop: Agent) -> None:
    for path in ("/api/agents", "/api/agents/shop"):
        answer = await client.get(path, headers=ADMIN)
        assert KEY not in answer.text
        assert OLD_KEY not in answer.text
    fingerprints = answer.json()["site_keys"]
    assert all(one.startswith("sha256:") and len(one) == 19 for one in fingerprints)
    shown = {name: value for name, value in answer.json().items() if name not in ("id", "name")}
    assert (await client.put("/api/agents/shop", json=shown, headers=ADMIN)).status_code == 200, "what is shown can be put"
    assert (await client.get("/api/agents/shop", headers=ADMIN)).json()["site_keys"] == fingerprints
    await say(client, new_session_id(), headers=as_user())


async def test_weakening_an_agent_by_a_site_key_that_is_none(client: httpx.AsyncClient, shop: Agent) -> None:
    no_keys = (
        ["short"],
        ["sha256:" + "0" * 12],
        [KEY, KEY],
        ["k" * 31],
        ["k" * 256],
        ["\0" * 40],
        ["ü" * 40],
        [" " * 40],
        [1],
        KEY,
    )
    for keys in (*no_keys, [f"{number}" * 32 for number in range(5)]):
        answer = await client.put("/api/agents/shop", json={"graph": "echo", "site_keys": keys}, headers=ADMIN)
        assert (answer.status_code, answer.json()["code"]) == (422, "invalid_field"), keys
        assert answer.json()["field"].startswith("site_keys")
        assert KEY not in answer.text
    honest = {"graph": "echo", "allowed_domains": [SHOP], "site_keys": ["n" * 32, KEY]}
    assert (await client.put("/api/agents/shop", json=honest, headers=ADMIN)).status_code == 200


async def test_finding_tokens_and_keys_in_the_log(client: httpx.AsyncClient, owned: str, minted: Session) -> None:
    token = user_token("user-2")
    secrets = [KEY, OLD_KEY, token, minted["session_token"], "sub-that-is-planted"]
    with capture_logs() as logs:
        await call(client, "message", owned, at(SHOP, **{"X-User-Token": token}))
        await call(client, "message", minted["session_id"], at(SHOP, **bearer(minted["session_token"])))
        await call(client, "message", owned, bearer(KEY))
        await call(client, "message", new_session_id(), as_user("sub-that-is-planted"))
        await client.put("/api/agents/shop", json={"graph": "nope", "site_keys": [KEY]}, headers=ADMIN)
        await client.put("/api/agents/shop", json={"graph": "echo", "site_keys": [KEY, 1]}, headers=ADMIN)
    assert [line["outcome"] for line in logs if line["event"] == "turn.completed"] == ["completed"] * 3, (
        "the log was captured"
    )
    assert [secret for secret in secrets if secret in str(logs)] == []
