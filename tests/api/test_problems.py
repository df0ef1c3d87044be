"""What a pod says to requests that it cannot serve: a problem document that names what is wrong, never a 5xx."""

import json
from base64 import urlsafe_b64encode
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gateway.app import Stores
from tests.conftest import PutAgent
from tests.support.serving import ADMIN
from tests.support.visiting import Flush, new_session_id, post_message, problem, say

MESSAGE = "/api/chat/shop/message"
JSON = {"Content-Type": "application/json"}
LARGEST_BODY = 262_144


async def post_raw(client: httpx.AsyncClient, raw: bytes, path: str = MESSAGE) -> httpx.Response:
    return await client.post(path, content=raw, headers=JSON)


def outcome(answer: httpx.Response) -> tuple[int, str, str | None]:
    """Status, code and field of an answer that must be a problem document."""
    assert answer.headers["content-type"] == "application/problem+json", answer.text
    document = answer.json()
    problem(answer, document["status"], document["code"], document.get("field"))
    return document["status"], document["code"], document.get("field")


def body(**fields: Any) -> dict[str, Any]:
    return {"message": "Hello", "session_id": new_session_id(), **fields}


@pytest.fixture(autouse=True)
async def shop(put_agent: PutAgent) -> None:
    """The agent that every test here talks to, unless it talks to nobody."""
    await put_agent("shop")


@pytest.fixture(autouse=True)
async def no_dead_letters(stores: Stores, flush: Flush, shop: None) -> AsyncIterator[None]:
    """Whatever was accepted, Postgres takes."""
    yield
    await flush()
    assert await stores.outbox.dead_letters() == []


# ------------------------------------------------------------------------------------------------- addresses and methods


async def test_an_unknown_address_is_404(client: httpx.AsyncClient) -> None:
    for path in ("/nothing", "/api/chat/shop/nothing", "/api/sessions/session_1234567890_abc/nothing", "/api/chat//message"):
        problem(await client.get(path), 404, "not_found")


async def test_a_wrong_method_is_405_and_told_the_right_ones(client: httpx.AsyncClient) -> None:
    for method, path, allowed in (
        ("GET", MESSAGE, {"POST"}),
        ("PUT", "/api/sessions", {"GET", "HEAD", "POST"}),
        ("POST", "/api/agents/shop", {"GET", "HEAD", "PUT", "PATCH", "DELETE"}),
        ("POST", "/healthz", {"GET", "HEAD"}),
    ):
        answer = await client.request(method, path)
        problem(answer, 405, "method_not_allowed")
        assert set(answer.headers["allow"].split(", ")) == allowed


async def test_every_problem_has_a_request_id_of_its_own(client: httpx.AsyncClient) -> None:
    headers = {"X-Request-Id": "mine"}
    ids = {(await client.get("/nothing", headers=headers)).json()["request_id"] for _ in range(5)}
    assert len(ids) == 5
    assert "mine" not in ids


async def test_a_website_can_read_a_problem_too(client: httpx.AsyncClient) -> None:
    answer = await client.post(MESSAGE, json={}, headers={"Origin": "https://shop.example"})
    problem(answer, 422, "invalid_field", "message")
    assert answer.headers["access-control-allow-origin"] == "https://shop.example"


# ---------------------------------------------------------------------------------------------------------- broken bodies


BROKEN = [
    b"",
    b" ",
    b"{",
    b"{'message': 1}",
    b"\xef\xbb\xbf{}",
    b'{"metadata": {"a": "\xff\xfe"}}',
    b'{"metadata": {"a": "\xed\xa0\x80"}}',
    b'{"metadata": {"a": "\\ud800"}}',
    b'{"metadata": {"\\udfff": 1}}',
    b'{"metadata": {"a": NaN}}',
    b'{"metadata": {"a": "a\nb"}}',
    b'{"metadata": {"a": 01}}',
    b'{"metadata": {"a": 1}, }',
]


async def test_what_is_not_json_in_utf_8_is_400(client: httpx.AsyncClient) -> None:
    for path in (MESSAGE, "/api/sessions"):
        for raw in BROKEN:
            assert outcome(await post_raw(client, raw, path)) == (400, "invalid_json", None), raw
    whole = json.dumps(body()).encode()
    assert outcome(await post_raw(client, whole + b"}")) == (400, "invalid_json", None)


async def test_another_media_type_is_415(client: httpx.AsyncClient) -> None:
    raw = json.dumps(body()).encode()
    for media_type in (None, "text/plain", "application/x-www-form-urlencoded", "application/jsonx"):
        headers = {"Content-Type": media_type} if media_type else {}
        problem(await client.post(MESSAGE, content=raw, headers=headers), 415, "unsupported_media_type")


async def test_json_may_be_called_by_its_other_spellings(client: httpx.AsyncClient) -> None:
    for media_type in ("application/json; charset=utf-8", "Application/JSON"):
        answer = await client.post(MESSAGE, content=json.dumps(body()), headers={"Content-Type": media_type})
        assert answer.status_code == 200


async def test_a_body_that_says_it_is_too_large_is_413(client: httpx.AsyncClient) -> None:
    raw = b'{"message": "' + b"a" * LARGEST_BODY + b'"}'
    problem(await post_raw(client, raw), 413, "body_too_large")
    assert (await post_message(client, new_session_id())).status_code == 200


async def test_a_body_that_turns_out_too_large_is_413(client: httpx.AsyncClient) -> None:
    async def chunks() -> AsyncIterator[bytes]:
        for _ in range(LARGEST_BODY // 8192 + 1):
            yield b" " * 8192

    answer = await client.post(MESSAGE, content=chunks(), headers=JSON)
    assert "content-length" not in answer.request.headers
    problem(answer, 413, "body_too_large")


async def test_a_body_of_the_largest_size_is_taken(client: httpx.AsyncClient) -> None:
    raw = json.dumps(body()).encode()
    answer = await post_raw(client, raw + b" " * (LARGEST_BODY - len(raw)))
    assert answer.status_code == 200, answer.text


# ----------------------------------------------------------------------------------------------------------- wrong fields


MESSAGE_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"message": 1}, "message"),
    ({"message": None}, "message"),
    ({"message": ""}, "message"),
    ({"message": "a" * 32_001}, "message"),
    ({"message": "a\0b"}, "message"),
    ({"session_id": ["session_1234567890_abc"]}, "session_id"),
    ({"session_id": "too-short"}, "session_id"),
    ({"session_id": "a" * 256}, "session_id"),
    ({"session_id": "session_1234567890 abc"}, "session_id"),
    ({"session_id": "session_1234567890_abc\n"}, "session_id"),
    ({"session_id": "session_1234567890_äöü"}, "session_id"),
    ({"metadata": []}, "metadata"),
    ({"metadata": None}, "metadata"),
    ({"metadata": {"website_domain": 5}}, "metadata.website_domain"),
    ({"metadata": {"website_domain": None}}, "metadata.website_domain"),
    ({"metadata": {"website_domain": "a" * 256}}, "metadata.website_domain"),
    ({"metadata": {"a": [{"b": "\0"}]}}, "metadata.a.0.b"),
    ({"metadata": {"\0": 1}}, "metadata"),
    ({"message_id": 7}, "message_id"),
    ({"message_id": ""}, "message_id"),
    ({"message_id": "a b"}, "message_id"),
    ({"message_id": '"}'}, "message_id"),
    ({"channel": "fax"}, "channel"),
    ({"audio_url": 1}, "audio_url"),
    ({"audio_url": "a" * 2049}, "audio_url"),
    ({"audio_url": "\0"}, "audio_url"),
    ({"audio_duration_ms": -1}, "audio_duration_ms"),
    ({"audio_duration_ms": 1.5}, "audio_duration_ms"),
    ({"audio_duration_ms": "1"}, "audio_duration_ms"),
    ({"audio_duration_ms": 2**31}, "audio_duration_ms"),
    ({"audio_duration_ms": 10**300}, "audio_duration_ms"),
    ({"if_busy": "wait"}, "if_busy"),
    ({"unheard_of": 1}, "unheard_of"),
]


async def test_a_wrong_field_of_a_message_is_named(client: httpx.AsyncClient) -> None:
    for fields, field in MESSAGE_FIELDS:
        answer = await client.post(MESSAGE, json=body(**fields))
        assert outcome(answer) == (422, "invalid_field", field), fields


SESSION_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({}, "agent_id"),
    ({"agent_id": 1}, "agent_id"),
    ({"agent_id": ""}, "agent_id"),
    ({"agent_id": "shop", "session_id": "short"}, "session_id"),
    ({"agent_id": "shop", "channel": 1}, "channel"),
    ({"agent_id": "shop", "metadata": "text"}, "metadata"),
    ({"agent_id": "shop", "metadata": {"a": "\0"}}, "metadata.a"),
    ({"agent_id": "shop", "message": "Hello"}, "message"),
]


async def test_a_wrong_field_of_a_session_is_named(client: httpx.AsyncClient) -> None:
    for fields, field in SESSION_FIELDS:
        answer = await client.post("/api/sessions", json=fields)
        assert outcome(answer) == (422, "invalid_field", field), fields


AGENT_FIELDS: list[tuple[dict[str, Any], str]] = [
    ({}, "graph"),
    ({"graph": "no-such-graph"}, "graph"),
    ({"graph": 1}, "graph"),
    ({"graph": "echo", "config": []}, "config"),
    ({"graph": "echo", "config": {"a": "\0"}}, "config.a"),
    ({"graph": "echo", "allowed_domains": "shop.example"}, "allowed_domains"),
    ({"graph": "echo", "channels": []}, "channels"),
    ({"graph": "echo", "history_window": -1}, "history_window"),
    ({"graph": "echo", "hot_ttl_s": 0}, "hot_ttl_s"),
    ({"graph": "echo", "turn_timeout_s": 0}, "turn_timeout_s"),
    ({"graph": "echo", "if_busy": "wait"}, "if_busy"),
    ({"graph": "echo", "rate_limit": {"messages": 0, "per_s": 1}}, "rate_limit.messages"),
    ({"graph": "echo", "rate_limit": {"messages": 1}}, "rate_limit.per_s"),
    ({"graph": "echo", "truncate_ip": "yes"}, "truncate_ip"),
    ({"graph": "echo", "retention_days": 0}, "retention_days"),
    ({"graph": "echo", "retention_days": 3651}, "retention_days"),
    ({"graph": "echo", "name": "another"}, "name"),
]


async def test_a_wrong_field_of_an_agent_is_named(client: httpx.AsyncClient) -> None:
    for fields, field in AGENT_FIELDS:
        answer = await client.put("/api/agents/new", json=fields, headers=ADMIN)
        assert outcome(answer) == (422, "invalid_field", field), fields


async def test_an_agent_needs_a_proper_name(client: httpx.AsyncClient) -> None:
    for name in ("a b", "ä", "a" * 101, "a%0Ab", "a:b"):
        answer = await client.put(f"/api/agents/{name}", json={"graph": "echo"}, headers=ADMIN)
        assert outcome(answer) == (422, "invalid_field", "agent_id"), name
    answer = await client.put("/api/agents/01900000-0000-7000-8000-000000000000", json={"graph": "echo"}, headers=ADMIN)
    assert outcome(answer) == (404, "agent_not_found", None)


async def test_a_body_that_is_no_object_is_422(client: httpx.AsyncClient) -> None:
    for raw in (b"[]", b"null", b'"text"', b"1"):
        assert outcome(await post_raw(client, raw)) == (422, "invalid_field", "body"), raw


LIST_PARAMETERS = [
    ("limit=0", "limit"),
    ("limit=201", "limit"),
    ("limit=many", "limit"),
    ("limit=99999999999999999999", "limit"),
    ("channel=fax", "channel"),
    ("status=%00", "status"),
    ("website_domain=%00", "website_domain"),
    ("unheard_of=1", "unheard_of"),
    ("cursor=!", "cursor"),
    ("cursor=%C3%A4", "cursor"),
]


async def test_a_wrong_parameter_of_the_list_is_named(client: httpx.AsyncClient) -> None:
    for query, field in LIST_PARAMETERS:
        answer = await client.get(f"/api/sessions?{query}", headers=ADMIN)
        assert outcome(answer) == (422, "invalid_field", field), query


CURSORS = [
    "yesterday\nsession_1234567890_abc",
    "2026-01-01T00:00:00.000Z",
    "0001-01-01\nsession_1234567890_abc",
    "0001-01-01T00:00:00+14:00\nsession_1234567890_abc",
    "9999-12-31T23:59:59-14:00\nsession_1234567890_abc",
    "2026-01-01T00:00:00.000Z\n\0",
]


async def test_a_made_up_cursor_is_named(client: httpx.AsyncClient) -> None:
    for position in CURSORS:
        cursor = urlsafe_b64encode(position.encode()).decode().rstrip("=")
        answer = await client.get("/api/sessions", params={"cursor": cursor}, headers=ADMIN)
        assert outcome(answer) == (422, "invalid_field", "cursor"), position


async def test_a_wrong_parameter_of_a_transcript_is_named(client: httpx.AsyncClient) -> None:
    session_id = new_session_id()
    await say(client, session_id)
    for query in ("before=0", "before=a", "before=2147483648", "limit=0", "limit=201", "page=1"):
        answer = await client.get(f"/api/sessions/{session_id}/messages?{query}")
        assert outcome(answer) == (422, "invalid_field", query.partition("=")[0]), query


# ------------------------------------------------------------------------------------------- odd but possible, and stored


ODD = [
    '{"n": 1e308, "m": -1e308, "l": 1e-320, "z": -0.0}',
    '{"n": %s}' % ("9" * 300),
    '{"n": 18446744073709551616}',
    '{"": {"": [[], {}, null, true]}}',
    '{"message_id": "m1", "text": "\\"message_id\\":\\"m1\\""}',
    '{"text": "\\uffff \\u2028 \\ud83d\\ude42 \\u0001"}',
]


async def test_odd_json_is_stored_and_comes_back(client: httpx.AsyncClient, stores: Stores, flush: Flush) -> None:
    for metadata in ODD:
        session_id = new_session_id()
        raw = f'{{"message": "Hello", "session_id": "{session_id}", "message_id": "m1", "metadata": {metadata}}}'.encode()
        first = await post_raw(client, raw)
        assert first.status_code == 200, first.text
        await flush()
        await stores.client.delete(stores.keys.session(session_id))
        again = await post_raw(client, raw)
        assert again.json()["metadata"]["replayed"], metadata
        assert again.json()["metadata"]["turn_id"] == first.json()["metadata"]["turn_id"]


TWICE = [
    ('"message": "One", "message": "Two"', "message"),
    ('"message": "One", "mess\\u0061ge": "Two"', "message"),
    ('"message": "One", "message" : "\\":"', "message"),
    ('"message": "One", "metadata": {"a": 1, "a": 2}', "metadata.a"),
    ('"message": "One", "metadata": {"a": [{"b": {}}, {"b": {"c": 1, "c": 1}}]}', "metadata.a.1.b.c"),
]


async def test_a_name_that_is_given_twice_is_refused(client: httpx.AsyncClient) -> None:
    """Which of the two counts, a proxy or a filter before the gateway may see differently."""
    for fields, field in TWICE:
        raw = f'{{"session_id": "{new_session_id()}", {fields}}}'.encode()
        assert outcome(await post_raw(client, raw)) == (422, "invalid_field", field), fields
    alike = '"message": "\\"message\\": \\u0061", "metadata": {"message": {"message": ":"}, "a": [{"a": 1}, {"a": 1}]}'
    answer = await post_raw(client, f'{{"session_id": "{new_session_id()}", {alike}}}'.encode())
    assert answer.json()["response"] == 'You said: "message": a'


async def deepest_accepted(send: Any) -> int:
    """How deeply nested the deepest JSON is that a call takes; deeper ones are a problem of the 4xx kind."""
    low, high = 1, 100_000
    while high - low > 1:
        middle = (low + high) // 2
        answer: httpx.Response = await send(middle)
        assert answer.status_code < 500, f"{answer.status_code} at a depth of {middle}"
        low, high = (middle, high) if answer.status_code < 300 else (low, middle)
    return low


async def test_whatever_depth_is_accepted_can_be_read_again(client: httpx.AsyncClient, stores: Stores, flush: Flush) -> None:
    async def send(depth: int) -> httpx.Response:
        metadata = "[" * depth + "]" * depth
        session_id = f"session_nested_{depth:06}"
        raw = f'{{"message": "Hello", "session_id": "{session_id}", "message_id": "m", "metadata": {{"a": {metadata}}}}}'
        return await post_raw(client, raw.encode())

    session_id = f"session_nested_{await deepest_accepted(send):06}"
    for _ in range(2):
        for path in ("", "/messages"):
            answer = await client.get(f"/api/sessions/{session_id}{path}")
            assert answer.status_code == 200, f"what was accepted for {session_id} cannot be read"
        await flush()
        await stores.client.delete(stores.keys.session(session_id))


async def test_whatever_depth_an_agent_may_have_it_can_be_listed(client: httpx.AsyncClient) -> None:
    async def send(depth: int) -> httpx.Response:
        config = "[" * depth + "]" * depth
        raw = f'{{"graph": "echo", "config": {{"a": {config}}}}}'.encode()
        return await client.put("/api/agents/nested", content=raw, headers=JSON | ADMIN)

    assert (await send(await deepest_accepted(send))).status_code == 200
    assert (await client.get("/api/agents", headers=ADMIN)).status_code == 200
    assert (await client.get("/api/agents/nested", headers=ADMIN)).status_code == 200


@pytest.mark.parametrize(
    ("origin", "domain"),
    [
        (f"https://{'a' * 300}.example", ""),
        (None, "\u0130" * 255),
    ],
    ids=["in the Origin header", "that grows in lower case"],
)
async def test_a_website_domain_of_any_length_never_makes_a_dead_letter(
    origin: str | None, domain: str, client: httpx.AsyncClient, stores: Stores, flush: Flush
) -> None:
    headers = {"Origin": origin} if origin else None
    answer = await post_message(client, new_session_id(), headers=headers, metadata={"website_domain": domain})
    assert answer.status_code < 500
    await flush()
    assert [letter.reason for letter in await stores.outbox.dead_letters()] == []


JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(10**400), 10**400)
    | st.floats()
    | st.text(st.characters(exclude_categories=()), max_size=20),
    lambda children: st.lists(children, max_size=4) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=12,
)
NAMES = [
    "message", "session_id", "metadata", "message_id", "channel", "audio_url", "audio_duration_ms", "if_busy",
    "agent_id", "user_token", "graph", "config", "allowed_domains", "channels", "history_window", "hot_ttl_s",
    "turn_timeout_s", "rate_limit", "require_token", "active", "site_keys", "require_identity",
]  # fmt: skip
LIKELY = {
    MESSAGE: {"message": "Hello", "session_id": "session_1234567890_random"},
    "/api/sessions": {"agent_id": "shop"},
    "/api/agents/random": {"graph": "echo"},
}


@st.composite
def raw_bodies(draw: st.DrawFn, path: str) -> bytes:
    """Bytes, JSON of any kind, or a good body of which some fields are replaced."""
    kind = draw(st.sampled_from(["bytes", "json", "fields", "fields", "fields", "metadata"]))
    if kind == "bytes":
        return draw(st.binary(max_size=60))
    if kind == "json":
        return json.dumps(draw(JSON_VALUES)).encode()
    if kind == "fields":
        fields = draw(st.dictionaries(st.sampled_from(NAMES), JSON_VALUES, max_size=2))
        return json.dumps(LIKELY[path] | fields).encode()
    name = "config" if "agents" in path else "metadata"
    extra = {name: draw(st.dictionaries(st.text(max_size=8), JSON_VALUES, max_size=4))}
    return json.dumps(LIKELY[path] | extra).encode()


@pytest.mark.parametrize("path", list(LIKELY))
@given(data=st.data())
@hypothesis_settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
async def test_no_body_makes_a_5xx_or_a_dead_letter(
    path: str, data: st.DataObject, client: httpx.AsyncClient, stores: Stores, flush: Flush
) -> None:
    raw = data.draw(raw_bodies(path))
    method = "PUT" if "agents" in path else "POST"
    answer = await client.request(method, path, content=raw, headers=JSON | (ADMIN if method == "PUT" else {}))
    assert answer.status_code < 500, (raw, answer.text)
    if answer.status_code >= 400:
        outcome(answer)
    await flush()
    assert await stores.client.xlen(stores.keys.dead(0)) == 0, raw
    if path == MESSAGE:
        stored = await client.get("/api/sessions/session_1234567890_random/messages")
        assert stored.status_code in (200, 404), (raw, stored.text)
    if method == "PUT":
        assert (await client.get("/api/agents", headers=ADMIN)).status_code == 200, raw


# ---------------------------------------------------------------------------------------------------- who may do what


async def test_an_unknown_agent_is_404_everywhere(client: httpx.AsyncClient) -> None:
    for reference in ("nobody", "01900000-0000-7000-8000-000000000000", "a%00b"):
        for answer in (
            await client.post(f"/api/chat/{reference}/message", json=body()),
            await client.get(f"/api/agents/{reference}", headers=ADMIN),
            await client.delete(f"/api/agents/{reference}", headers=ADMIN),
            await client.get(f"/api/sessions?agent_id={reference}", headers=ADMIN),
            await client.get(f"/api/sessions/stats?agent_id={reference}", headers=ADMIN),
        ):
            problem(answer, 404, "agent_not_found")
    problem(await client.post("/api/sessions", json={"agent_id": "nobody"}), 404, "agent_not_found")


async def test_an_agent_that_is_switched_off_answers_nobody(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("off", active=False)
    problem(await client.post("/api/chat/off/message", json=body()), 403, "agent_inactive")
    problem(await client.post("/api/sessions", json={"agent_id": "off"}), 403, "agent_inactive")


async def test_an_unknown_session_is_404(client: httpx.AsyncClient) -> None:
    for session_id in (new_session_id(), "short", "a" * 300, "session_1234567890%20abc", "session_1234567890%00abc"):
        for answer in (
            await client.get(f"/api/sessions/{session_id}"),
            await client.get(f"/api/sessions/{session_id}/messages"),
            await client.post(f"/api/sessions/{session_id}/end"),
            await client.delete(f"/api/sessions/{session_id}"),
        ):
            problem(answer, 404, "session_not_found")


async def test_from_another_website_a_session_does_not_exist(
    client: httpx.AsyncClient, stores: Stores, flush: Flush
) -> None:
    session_id = new_session_id()
    await say(client, session_id, headers={"Origin": "https://shop.example"})
    elsewhere = {"Origin": "https://evil.example"}
    for _ in range(2):
        for answer in (
            await post_message(client, session_id, headers=elsewhere),
            await post_message(client, session_id, metadata={"website_domain": "evil.example"}),
            await client.get(f"/api/sessions/{session_id}", headers=elsewhere),
            await client.get(f"/api/sessions/{session_id}/messages", headers=elsewhere),
            await client.post(f"/api/sessions/{session_id}/end", headers=elsewhere),
            await client.delete(f"/api/sessions/{session_id}", headers=elsewhere),
            await client.post("/api/sessions", json={"agent_id": "shop", "session_id": session_id}, headers=elsewhere),
        ):
            problem(answer, 404, "session_not_found")
        await flush()
        await stores.client.delete(stores.keys.session(session_id))


async def test_at_another_agent_a_session_does_not_exist(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("bank")
    session_id = new_session_id()
    await say(client, session_id)
    problem(await post_message(client, session_id, agent="bank"), 404, "session_not_found")
    opened = await client.post("/api/sessions", json={"agent_id": "bank", "session_id": session_id})
    problem(opened, 404, "session_not_found")


async def test_a_wrong_or_foreign_token_is_401(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("bank")
    mine = (await client.post("/api/sessions", json={"agent_id": "shop"})).json()
    foreign = (await client.post("/api/sessions", json={"agent_id": "shop"})).json()
    for token in (foreign["session_token"], mine["session_token"] + "A", "a.b.c", "nonsense"):
        headers = {"Authorization": f"Bearer {token}"}
        for answer in (
            await post_message(client, mine["session_id"], headers=headers),
            await client.get(f"/api/sessions/{mine['session_id']}", headers=headers),
            await client.get(f"/api/sessions/{mine['session_id']}/messages", headers=headers),
            await client.delete(f"/api/sessions/{mine['session_id']}", headers=headers),
        ):
            problem(answer, 401, "session_token_invalid")
            assert answer.headers["www-authenticate"] == "Bearer"
    at_another_agent = {"Authorization": f"Bearer {mine['session_token']}"}
    answer = await post_message(client, mine["session_id"], agent="bank", headers=at_another_agent)
    problem(answer, 401, "session_token_invalid")


async def test_a_token_does_not_open_a_session_from_another_website(client: httpx.AsyncClient) -> None:
    opened = await client.post("/api/sessions", json={"agent_id": "shop"}, headers={"Origin": "https://shop.example"})
    session = opened.json()
    headers = {"Authorization": f"Bearer {session['session_token']}", "Origin": "https://evil.example"}
    problem(await client.get(f"/api/sessions/{session['session_id']}", headers=headers), 404, "session_not_found")


ORIGINS = [
    ("https://shop.example", True),
    ("https://SHOP.example:8443", True),
    ("https://www.chain.example", True),
    ("https://a.b.chain.example", True),
    ("https://chain.example", False),
    ("https://evilchain.example", False),
    ("https://www.shop.example", False),
    ("https://shop.example.evil.example", False),
    ("https://evil.example", False),
    ("null", False),
    (None, False),
]


async def test_an_agent_answers_only_the_websites_it_allows(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("picky", allowed_domains=("shop.example", "*.chain.example"))
    for origin, allowed in ORIGINS:
        headers = {"Origin": origin} if origin else {}
        for answer in (
            await client.post("/api/chat/picky/message", json=body(), headers=headers),
            await client.post("/api/sessions", json={"agent_id": "picky"}, headers=headers),
        ):
            if allowed:
                assert answer.is_success, (origin, answer.text)
            else:
                assert outcome(answer) == (403, "domain_not_allowed", None), origin


async def test_what_a_page_says_of_itself_opens_no_door(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("picky", allowed_domains=("shop.example",))
    claim = body(metadata={"website_domain": "shop.example"})
    problem(await client.post("/api/chat/picky/message", json=claim), 403, "domain_not_allowed")
    headers = {"Origin": "https://shop.example"}
    assert (await client.post("/api/chat/picky/message", json=claim, headers=headers)).status_code == 200
    for origin in ("https://evil.example", "null", ""):
        answer = await client.post("/api/chat/picky/message", json=claim, headers={"Origin": origin})
        problem(answer, 403, "domain_not_allowed")


async def test_a_user_token_that_cannot_be_verified_is_401(client: httpx.AsyncClient) -> None:
    answer = await client.post("/api/sessions", json={"agent_id": "shop", "user_token": "a.b.c"})
    problem(answer, 401, "user_token_invalid")


async def test_too_many_messages_in_a_session_are_429_and_told_when_to_come_back(
    client: httpx.AsyncClient, put_agent: PutAgent
) -> None:
    await put_agent("slow", rate_limit={"messages": 2, "per_s": 600})
    session_id = new_session_id()
    for _ in range(2):
        await say(client, session_id, agent="slow")
    answer = await post_message(client, session_id, agent="slow")
    document = problem(answer, 429, "rate_limited")
    assert document["retryable"]
    assert 0 < document["retry_after"] <= 300
    assert int(answer.headers["retry-after"]) == document["retry_after"]
    await say(client, new_session_id(), agent="slow")
