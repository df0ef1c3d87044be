"""Sessions over HTTP: opening them, their channels, paging through transcripts and lists, totals."""

from typing import Any

import httpx
import pytest

from gateway.app import Stores
from tests.conftest import PutAgent
from tests.support.serving import ADMIN
from tests.support.visiting import Flush, Rows, new_session_id, post_message, problem, say, transcript

TURNS = 12
EVERYTHING = [text for n in range(1, TURNS + 1) for text in (f"Message {n}", f"You said: Message {n}")]


async def test_opening_a_chosen_id_creates_it_once_and_finds_it_then(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush
) -> None:
    await put_agent("shop")
    body = {"agent_id": "shop", "session_id": new_session_id(), "channel": "voice"}
    first = await client.post("/api/sessions", json=body)
    again = await client.post("/api/sessions", json=body)
    await flush()
    await stores.client.delete(stores.keys.session(body["session_id"]))
    stored = await client.post("/api/sessions", json=body)
    assert [answer.status_code for answer in (first, again, stored)] == [201, 200, 200]
    for name in ("session_id", "agent_id", "channel", "status", "started_at"):
        assert first.json()[name] == again.json()[name] == stored.json()[name]


async def test_minted_ids_are_all_different_and_long_enough_to_be_secrets(
    client: httpx.AsyncClient, put_agent: PutAgent
) -> None:
    await put_agent("shop")
    opened = [(await client.post("/api/sessions", json={"agent_id": "shop"})).json() for _ in range(5)]
    ids = {session["session_id"] for session in opened}
    assert len(ids) == 5
    assert all(len(session_id) >= 24 for session_id in ids)


async def test_an_owner_finds_a_minted_session_again_with_its_token(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop")
    session = (await client.post("/api/sessions", json={"agent_id": "shop"})).json()
    body = {"agent_id": "shop", "session_id": session["session_id"]}
    token = {"Authorization": f"Bearer {session['session_token']}"}
    found = await client.post("/api/sessions", json=body, headers=token)
    assert (found.status_code, found.json()["session_id"]) == (200, session["session_id"])


async def test_a_session_knows_what_it_was_opened_with(
    client: httpx.AsyncClient, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    agent = await put_agent("shop")
    session_id = new_session_id()
    await client.post(
        "/api/sessions",
        json={"agent_id": agent.id, "session_id": session_id, "metadata": {"page": "/cart"}},
        headers={"Origin": "https://Shop.Example", "User-Agent": "a browser"},
    )
    await flush()
    ((domain, address, user_agent, metadata),) = await rows(
        "SELECT website_domain, ip_address, user_agent, metadata::text FROM agent_sessions"
    )
    assert (domain, address, user_agent, metadata) == ("shop.example", "127.0.0.1", "a browser", '{"page": "/cart"}')


@pytest.mark.parametrize("channel", ["text", "voice", "phone"])
async def test_a_session_may_be_on_any_channel_of_its_agent(
    channel: str, client: httpx.AsyncClient, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent("shop")
    await say(client, new_session_id(), channel=channel)
    await flush()
    assert [row[0] for row in await rows("SELECT channel FROM agent_sessions")] == [channel]


async def test_without_a_channel_the_agents_first_one_is_taken(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop", channels=("phone", "text"))
    opened = await client.post("/api/sessions", json={"agent_id": "shop"})
    assert opened.json()["channel"] == "phone"


async def test_a_channel_that_the_agent_does_not_have_is_refused(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop", channels=("text",))
    opened = await client.post("/api/sessions", json={"agent_id": "shop", "channel": "voice"})
    problem(opened, 403, "channel_not_allowed", "channel")
    problem(await post_message(client, new_session_id(), channel="voice"), 403, "channel_not_allowed", "channel")


async def test_what_was_spoken_is_kept_with_its_message(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush, rows: Rows
) -> None:
    await put_agent("shop")
    session_id = new_session_id()
    audio: dict[str, Any] = {"audio_url": "https://cdn.example/a.ogg", "audio_duration_ms": 1200}
    await say(client, session_id, channel="voice", **audio)
    await flush()
    stored = await rows("SELECT role, audio_url, audio_duration_ms FROM agent_messages ORDER BY seq")
    assert [tuple(row) for row in stored] == [("user", *audio.values()), ("assistant", None, None)]

    live = (await client.get(f"/api/sessions/{session_id}/messages")).json()["messages"]
    assert {name: live[0][name] for name in audio} == audio
    assert "audio_url" not in live[1]
    await stores.client.delete(stores.keys.session(session_id))
    assert (await client.get(f"/api/sessions/{session_id}/messages")).json()["messages"] == live


async def page_through(client: httpx.AsyncClient, session_id: str, limit: int) -> list[dict[str, Any]]:
    """The whole transcript, page by page from the newest."""
    found: list[dict[str, Any]] = []
    before: int | None = None
    for _ in range(2 * TURNS + 1):
        parameters = {"limit": limit} | ({} if before is None else {"before": before})
        page = (await client.get(f"/api/sessions/{session_id}/messages", params=parameters)).json()
        assert len(page["messages"]) <= limit
        found = page["messages"] + found
        before = page["next_before"]
        if before is None:
            return found
        assert len(page["messages"]) == limit
        assert before == page["messages"][0]["seq"]
    raise AssertionError("paging has no end")


async def check_pages(client: httpx.AsyncClient, session_id: str) -> None:
    """Pages of any size make up the whole transcript, every message once and in its place."""
    for limit in (1, 3, 4, 7, 24, 200):
        messages = await page_through(client, session_id, limit)
        assert [message["content"] for message in messages] == EVERYTHING
        assert [message["seq"] for message in messages] == list(range(1, 2 * TURNS + 1))
        assert len({message["id"] for message in messages}) == 2 * TURNS


@pytest.mark.parametrize(("flushed_turns", "evicted"), [(0, False), (5, False), (9, False), (TURNS, False), (TURNS, True)])
async def test_pages_of_a_transcript_join_without_a_seam(
    flushed_turns: int, evicted: bool, client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush
) -> None:
    """With a hot window of two turns the older ones are in Postgres alone, but for those not flushed yet."""
    await put_agent("shop", history_window=4)
    session_id = new_session_id()
    for number in range(1, TURNS + 1):
        await say(client, session_id, f"Message {number}")
        if number <= flushed_turns:
            await flush()
    if evicted:
        await stores.client.delete(stores.keys.session(session_id))
    await check_pages(client, session_id)
    assert await transcript(client, session_id, before=5) == EVERYTHING[:4]
    assert await transcript(client, session_id, before=1) == []


async def test_the_seam_would_show_if_redis_forgot_a_turn_that_postgres_lacks(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores
) -> None:
    """The control of the seam: with an unflushed turn taken out of Redis, the check of the pages fails."""
    await put_agent("shop", history_window=4)
    session_id = new_session_id()
    for number in range(1, TURNS + 1):
        await say(client, session_id, f"Message {number}")
    await check_pages(client, session_id)
    key = stores.keys.session(session_id)
    await stores.client.hdel(key, "t:1")
    await stores.client.hset(key, "first_hot", "2")
    with pytest.raises(AssertionError):
        await check_pages(client, session_id)


async def test_a_message_is_shown_the_same_from_redis_and_from_postgres(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush
) -> None:
    await put_agent("shop")
    session_id = new_session_id()
    await say(client, session_id, "Grüße 🙂 \u2028", message_id="m1", metadata={"a": [1, {"b": None}]})
    live = (await client.get(f"/api/sessions/{session_id}/messages")).json()
    shown = (await client.get(f"/api/sessions/{session_id}")).json()
    await flush()
    await stores.client.delete(stores.keys.session(session_id))
    assert (await client.get(f"/api/sessions/{session_id}/messages")).json() == live
    assert (await client.get(f"/api/sessions/{session_id}")).json() == shown


async def make_sessions(client: httpx.AsyncClient, stores: Stores, flush: Flush) -> list[str]:
    """Ten sessions, oldest first: stored alone, live and flushed, live and stored in an older state, live alone."""
    sessions = [new_session_id() for _ in range(10)]
    for session_id in sessions[:7]:
        await say(client, session_id, headers={"Origin": "https://shop.example"})
    await flush()
    for session_id in sessions[:3]:
        await stores.client.delete(stores.keys.session(session_id))
    for session_id in sessions[5:]:
        await say(client, session_id, headers={"Origin": "https://shop.example"})
    return sessions


async def list_all(client: httpx.AsyncClient, limit: int, **filters: str) -> list[str]:
    """The ids of all pages of a list."""
    found: list[str] = []
    cursor: dict[str, str] = {}
    for _ in range(20):
        answer = await client.get("/api/sessions", params={"limit": limit, **filters, **cursor}, headers=ADMIN)
        assert answer.status_code == 200, answer.text
        page = answer.json()
        found += [session["session_id"] for session in page["sessions"]]
        if page["next_cursor"] is None:
            return found
        cursor = {"cursor": page["next_cursor"]}
    raise AssertionError("the list has no end")


async def test_pages_of_the_list_have_every_session_once(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush
) -> None:
    await put_agent("shop")
    sessions = await make_sessions(client, stores, flush)
    for limit in (1, 2, 3, 5, 10, 50):
        assert await list_all(client, limit) == sessions[::-1], f"pages of {limit}"


async def test_a_full_last_page_is_known_to_be_the_last(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop")
    for _ in range(2):
        await say(client, new_session_id())
    page = (await client.get("/api/sessions", params={"limit": 2}, headers=ADMIN)).json()
    assert len(page["sessions"]) == 2
    assert page["next_cursor"] is None


async def test_the_list_can_be_narrowed(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush
) -> None:
    agent = await put_agent("shop")
    await put_agent("bank")
    sessions = await make_sessions(client, stores, flush)
    bank = new_session_id()
    await say(client, bank, agent="bank", channel="phone", headers={"Origin": "https://bank.example"})
    for stored, live in ((0, 4), (1, 8)):
        for number in (stored, live):
            await client.post(f"/api/sessions/{sessions[number]}/end")
        if stored == 0:
            await flush()
    ended = [sessions[number] for number in (8, 4, 1, 0)]

    for limit in (1, 3, 50):
        assert await list_all(client, limit, agent_id="bank") == [bank]
        assert await list_all(client, limit, agent_id=agent.id) == sessions[::-1]
        assert await list_all(client, limit, website_domain="bank.example") == [bank]
        assert await list_all(client, limit, channel="phone") == [bank]
        assert await list_all(client, limit, status="ended") == ended
        active = [session_id for session_id in [bank, *sessions[::-1]] if session_id not in ended]
        assert await list_all(client, limit, status="active") == active
        assert await list_all(client, limit, status="timeout") == []


async def test_an_erased_session_leaves_the_list_and_the_totals_at_once(
    client: httpx.AsyncClient, put_agent: PutAgent, flush: Flush
) -> None:
    await put_agent("shop")
    session_id = new_session_id()
    await say(client, session_id)
    await flush()
    await client.delete(f"/api/sessions/{session_id}")
    for _ in range(2):
        totals = (await client.get("/api/sessions/stats", headers=ADMIN)).json()
        assert (totals["total_sessions"], totals["total_messages"]) == (0, 0)
        assert await list_all(client, 50) == []
        await flush()


async def test_the_totals_are_right_while_records_wait(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush
) -> None:
    agent = await put_agent("shop")
    sessions = await make_sessions(client, stores, flush)
    await client.post(f"/api/sessions/{sessions[0]}/end")
    for reference in ("shop", agent.id, None):
        for _ in range(2):
            parameters = {"agent_id": reference} if reference else {}
            totals = (await client.get("/api/sessions/stats", params=parameters, headers=ADMIN)).json()
            assert totals == {
                "total_sessions": 10,
                "active_sessions": 9,
                "avg_messages_per_session": 2.4,
                "total_messages": 24,
                "exact": True,
                "partial": False,
            }
    await flush()
    assert (await client.get("/api/sessions/stats", headers=ADMIN)).json() == totals


async def test_the_totals_of_nothing_are_zero(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop")
    totals = (await client.get("/api/sessions/stats", params={"agent_id": "shop"}, headers=ADMIN)).json()
    assert list(totals.values()) == [0, 0, 0.0, 0, True, False]


async def test_an_operator_reads_and_ends_any_session_with_the_admin_key(
    client: httpx.AsyncClient, put_agent: PutAgent
) -> None:
    await put_agent("shop")
    opened = await client.post("/api/sessions", json={"agent_id": "shop"}, headers={"Origin": "https://shop.example"})
    path = f"/api/sessions/{opened.json()['session_id']}"
    assert (await client.get(path, headers=ADMIN)).json()["website_domain"] == "shop.example"
    assert (await client.get(f"{path}/messages", headers=ADMIN)).json()["messages"] == []
    assert (await client.post(f"{path}/end", headers=ADMIN)).json()["status"] == "ended"
    assert (await client.delete(path, headers=ADMIN)).status_code == 204
