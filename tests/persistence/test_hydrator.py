"""A returning visitor: what Postgres has comes back into Redis, whole, and never an old state over a newer one."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import msgspec
import pytest
from uuid_utils.compat import uuid7

from gateway.app import Stores, build_pod
from gateway.settings import Settings
from persistence.errors import Damaged, PostgresUnavailable
from persistence.model.agents import TurnPolicy
from persistence.model.session import Access
from persistence.redis.outcomes import Absent, Begun, Hot, Replay
from tests.conftest import PutAgent
from tests.support.pods import rewrite
from tests.support.serving import served
from tests.support.stored import AGENT_ID, POLICY, VISITOR, Rows, another, evict, fields_of, open_session, read, say, ttl_of

Flush = Callable[[], Awaitable[None]]
SESSION_ID = "session_that_returns"
OWNER = Access(authorized=True)


async def ticket_of(stores: Stores, session_id: str = SESSION_ID) -> int:
    absent = await stores.sessions.read(session_id, OWNER)
    assert isinstance(absent, Absent)
    return absent.ticket


# ------------------------------------------------------------------------------------------------------- what comes back


async def test_it_comes_back_as_it_was(stores: Stores, flush: Flush) -> None:
    context: dict[str, Any] = {"name": "Zoë", "cart": [{"price": 1.5, "count": 2}], "none": None, "yes": True, "": {}}
    for number in range(4):
        metadata = {"history": number, "sources": [{"url": "https://shop.example", "score": 0.25}]}
        await say(stores, SESSION_ID, f"Question {number}", message_id=f"m-{number}", metadata=metadata, context=context)
    await flush()
    before = await read(stores, SESSION_ID)
    await evict(stores, SESSION_ID)
    after = await read(stores, SESSION_ID)
    assert after.session == before.session
    assert after.turns == before.turns
    assert (after.first_hot, after.flushed, after.first) == (1, 4, 1)
    assert 0 < await ttl_of(stores, SESSION_ID) <= POLICY.hot_ttl_s


@pytest.mark.parametrize("hot_turns", [1, 3, 24, 25, 26])
async def test_exactly_the_newest_turns_come_back(stores: Stores, flush: Flush, hot_turns: int, rows: Rows) -> None:
    turns = [await say(stores, SESSION_ID, f"Question {number}") for number in range(1, 26)]
    await flush()
    await evict(stores, SESSION_ID)
    ticket = await ticket_of(stores)
    snapshot = await stores.postgres.find_snapshot(SESSION_ID, hot_turns)
    assert snapshot is not None
    assert await stores.sessions.hydrate(snapshot, ticket, 60)
    fields = await fields_of(stores, SESSION_ID)
    kept = min(hot_turns, 25)
    assert sorted(name for name in fields if name.startswith("t:")) == sorted(f"t:{n}" for n in range(26 - kept, 26))
    hot = await read(stores, SESSION_ID)
    assert hot.turns == turns[-kept:]
    assert (hot.first_hot, hot.flushed, hot.session.turns, hot.session.message_count) == (26 - kept, 25, 25, 50)


async def test_the_agents_own_window_is_used(stores: Stores, flush: Flush, put_agent: PutAgent) -> None:
    agent = await put_agent("shop", history_window=24, hot_ttl_s=77)
    for number in range(14):
        await say(stores, SESSION_ID, f"Question {number}", agent_id=AGENT_ID)
    await flush()
    raw = msgspec.structs.replace(agent, id=AGENT_ID, name="other")
    await stores.agent_copies.put(raw)
    await evict(stores, SESSION_ID)
    hot = await read(stores, SESSION_ID)
    assert (hot.first_hot, len(hot.turns)) == (3, 12)
    assert 0 < await ttl_of(stores, SESSION_ID) <= 77


async def test_the_conversation_goes_on_with_the_next_numbers(stores: Stores, flush: Flush, rows: Rows) -> None:
    for number in range(3):
        await say(stores, SESSION_ID, f"Question {number}")
    await flush()
    await evict(stores, SESSION_ID)
    turn = await say(stores, SESSION_ID, "And now")
    assert turn.seq == 7
    await flush()
    found = await rows("SELECT turn, seq FROM agent_messages ORDER BY seq")
    assert [tuple(row) for row in found] == [(1, 1), (1, 2), (2, 3), (2, 4), (3, 5), (3, 6), (4, 7), (4, 8)]


async def test_a_retry_is_replayed_after_hydration(stores: Stores, flush: Flush) -> None:
    first = await say(stores, SESSION_ID, message_id="m-1", metadata={"history": 0, "note": "kept"})
    await say(stores, SESSION_ID, message_id="m-2")
    await flush()
    await evict(stores, SESSION_ID)
    await read(stores, SESSION_ID)
    outcome = await stores.sessions.begin(SESSION_ID, str(uuid7()), VISITOR, POLICY, message_id="m-1")
    assert isinstance(outcome, Replay)
    assert (outcome.number, outcome.turn) == (1, first)


@pytest.mark.parametrize("value", [1e20, 1e300, -1e25, 2**63, 2**64 - 1, 1.0, 5e-324])
@pytest.mark.parametrize("place", ["context", "metadata"])
async def test_numbers_of_any_size_come_back(stores: Stores, flush: Flush, place: str, value: float) -> None:
    """JSON in Postgres has one kind of number; a float such as 1e20 comes back from it as a long integer."""
    fields: dict[str, Any] = {place: {"value": value}}
    await say(stores, SESSION_ID, **fields)
    await flush()
    await evict(stores, SESSION_ID)
    hot = await read(stores, SESSION_ID)
    found = hot.session.context if place == "context" else hot.turns[-1].metadata
    assert found["value"] == value or float(found["value"]) == value


@pytest.mark.parametrize(
    "user_id", ["", "42", "Zoë", "9b2f1c1e-8f5a-4d43-9a57-0c3f0f8f7a11", "d41d8cd98f00b204e9800998ecf8427e"]
)
async def test_the_host_pages_user_id_comes_back_as_it_was(stores: Stores, flush: Flush, user_id: str) -> None:
    await say(stores, SESSION_ID, user_id=user_id)
    await flush()
    await evict(stores, SESSION_ID)
    assert (await read(stores, SESSION_ID)).session.user_id == user_id


async def test_a_session_without_turns_comes_back(stores: Stores, flush: Flush) -> None:
    await open_session(stores, SESSION_ID)
    await flush()
    before = await read(stores, SESSION_ID)
    await evict(stores, SESSION_ID)
    after = await read(stores, SESSION_ID)
    assert (after.session, after.turns, after.first_hot) == (before.session, [], 1)
    assert (await say(stores, SESSION_ID)).seq == 1


# -------------------------------------------------------------------------------------------------------------- the ticket


async def stalled_over_newer(stores: Stores, flush: Flush) -> bool:
    """A pod stalls after reading Postgres; meanwhile the session lives on, is flushed and evicted; then the pod wakes up."""
    await say(stores, SESSION_ID, "One")
    await flush()
    await evict(stores, SESSION_ID)
    ticket = await ticket_of(stores)
    old = await stores.postgres.find_snapshot(SESSION_ID, 25)
    assert old is not None
    await say(stores, SESSION_ID, "Two")
    await flush()
    await evict(stores, SESSION_ID)
    return await stores.sessions.hydrate(old, ticket, 1800)


async def test_a_pod_that_stalled_does_not_install_an_old_session(stores: Stores, flush: Flush) -> None:
    assert not await stalled_over_newer(stores, flush)
    assert (await read(stores, SESSION_ID)).session.turns == 2


async def test_without_the_ticket_it_would(stores: Stores, flush: Flush) -> None:
    """The control of the test above: the script without its check of the ticket."""
    check = "if redis.call('GET', ticket_key) ~= args.ticket then return reply('stale') end"
    rewrite(stores.scripts, "hydrate", lambda text: text.replace(check, ""))
    assert await stalled_over_newer(stores, flush)
    assert (await read(stores, SESSION_ID)).session.turns == 1


async def test_a_live_session_is_never_overwritten(stores: Stores, flush: Flush) -> None:
    await say(stores, SESSION_ID, "One")
    await flush()
    old = await stores.postgres.find_snapshot(SESSION_ID, 25)
    assert old is not None
    await say(stores, SESSION_ID, "Two")
    for ticket in (0, 1, 2):
        assert not await stores.sessions.hydrate(old, ticket, 1800)
    assert (await read(stores, SESSION_ID)).session.turns == 2


async def test_a_ticket_is_good_only_once(stores: Stores, flush: Flush) -> None:
    await say(stores, SESSION_ID)
    await flush()
    await evict(stores, SESSION_ID)
    ticket = await ticket_of(stores)
    snapshot = await stores.postgres.find_snapshot(SESSION_ID, 25)
    assert snapshot is not None
    assert not await stores.sessions.hydrate(snapshot, ticket + 1, 1800)
    assert await stores.sessions.hydrate(snapshot, ticket, 1800)
    await evict(stores, SESSION_ID)
    assert not await stores.sessions.hydrate(snapshot, ticket, 1800)
    await ticket_of(stores)
    assert not await stores.sessions.hydrate(snapshot, ticket, 1800)


@pytest.mark.parametrize("at_once", [2, 5, 20])
async def test_several_requests_of_one_returning_visitor_all_succeed(
    settings: Settings, stores: Stores, flush: Flush, at_once: int
) -> None:
    """Several tabs, or a page that loads the transcript while the visitor writes: nobody takes the ticket from another."""
    async with another(settings, "another-pod") as other:
        for number in range(10):
            session_id = f"{SESSION_ID}_{number}"
            await say(stores, session_id)
            await flush()
            await evict(stores, session_id)
            pods = [stores, other] * (at_once // 2 + 1)
            found = await asyncio.gather(*(read(pod, session_id) for pod in pods[:at_once]), return_exceptions=True)
            wrong = [outcome for outcome in found if not isinstance(outcome, Hot)]
            assert not wrong, f"{len(wrong)} of {at_once}: {wrong[0]!r}"


# ----------------------------------------------------------------------------------------------------------- what is wrong


@pytest.mark.parametrize("turn", [1, 3, 5])
async def test_a_hole_in_the_stored_turns_is_damage(stores: Stores, flush: Flush, rows: Rows, turn: int) -> None:
    for number in range(5):
        await say(stores, SESSION_ID, f"Question {number}")
    await flush()
    await evict(stores, SESSION_ID)
    await rows("DELETE FROM agent_messages WHERE turn = $1", turn)
    with pytest.raises(Damaged, match="in Postgres"):
        await read(stores, SESSION_ID)
    assert await fields_of(stores, SESSION_ID) == {}


@pytest.mark.parametrize("seq", [3, 4])
async def test_a_stored_turn_that_lacks_a_message_is_damage(stores: Stores, flush: Flush, rows: Rows, seq: int) -> None:
    for number in range(3):
        await say(stores, SESSION_ID, f"Question {number}")
    await flush()
    await evict(stores, SESSION_ID)
    await rows("DELETE FROM agent_messages WHERE seq = $1", seq)
    with pytest.raises(Damaged):
        await read(stores, SESSION_ID)


@pytest.mark.parametrize("column", ["context_data", "metadata"])
async def test_a_stored_field_that_is_no_object_is_damage(stores: Stores, flush: Flush, rows: Rows, column: str) -> None:
    await say(stores, SESSION_ID)
    await flush()
    await evict(stores, SESSION_ID)
    await rows(f"UPDATE agent_sessions SET {column} = '[1]'")
    with pytest.raises(Damaged, match=column):
        await read(stores, SESSION_ID)


async def test_an_unknown_session_is_absent(stores: Stores) -> None:
    assert await stores.hydrator.with_session(SESSION_ID, lambda: stores.sessions.read(SESSION_ID, OWNER)) is None


async def test_without_postgres_only_absent_sessions_have_to_wait(
    settings: Settings, stores: Stores, flush: Flush, put_agent: PutAgent
) -> None:
    agent = await put_agent("shop")
    away = "postgresql://127.0.0.1:1/gateway"
    body = {"message": "Hello", "session_id": SESSION_ID}
    async with another(settings, "cut-off", database_url=away) as cut_off:
        pod = await build_pod(msgspec.structs.replace(settings, database_url=away), cut_off)
        async with served(pod) as client:
            opened = await client.post("/api/sessions", json={"agent_id": agent.id})
            assert opened.status_code == 201
            token = {"Authorization": f"Bearer {opened.json()['session_token']}"}
            minted = body | {"session_id": opened.json()["session_id"]}
            for _ in range(2):
                answer = await client.post("/api/chat/shop/message", json=minted, headers=token)
                assert answer.status_code == 200

            await check_unavailable(await client.post("/api/chat/shop/message", json=body))
            await check_unavailable(await client.get(f"/api/sessions/{SESSION_ID}"))
            await check_unavailable(await client.delete(f"/api/sessions/{SESSION_ID}"))
    with pytest.raises(PostgresUnavailable):
        await cut_off.hydrator.hydrate(SESSION_ID, Absent(1))


async def check_unavailable(answer: httpx.Response) -> None:
    assert answer.status_code == 503
    assert answer.json()["code"] == "postgres_unavailable"
    assert int(answer.headers["retry-after"]) >= 1


async def test_a_turn_that_was_refused_for_lack_of_postgres_can_be_repeated(stores: Stores, settings: Settings) -> None:
    async with another(settings, "cut-off", database_url="postgresql://127.0.0.1:1/gateway") as cut_off:
        turn_id = str(uuid7())
        outcome = await cut_off.sessions.begin(SESSION_ID, turn_id, VISITOR, POLICY)
        assert isinstance(outcome, Absent)
        with pytest.raises(PostgresUnavailable):
            await cut_off.hydrator.hydrate(SESSION_ID, outcome)
    await say(stores, SESSION_ID)
    policy = TurnPolicy(hot_turns=25, hot_ttl_s=1800, if_busy="reject")
    outcome = await stores.sessions.begin(SESSION_ID, turn_id, VISITOR, policy)
    assert isinstance(outcome, Begun)
    await stores.sessions.abort(SESSION_ID, turn_id)
