"""Transcripts and lists across Redis and Postgres: nobody can see where one ends and the other begins."""

from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import product

import pytest

from gateway.app import Stores
from gateway.settings import Settings
from persistence.errors import PostgresUnavailable
from persistence.history import History, MessagePage
from persistence.model.agents import TurnPolicy
from persistence.model.session import Access, StoredMessage, transcript
from persistence.postgres.postgres import SessionFilter
from tests.support.stored import another, evict, fields_of, history_of, open_session, read, say

Flush = Callable[[], Awaitable[None]]
SESSION_ID = "session_with_a_long_history"
OWNER = Access(authorized=True)
NARROW = TurnPolicy(hot_turns=3, hot_ttl_s=1800)
TURNS = 10


@pytest.fixture
async def full(stores: Stores, flush: Flush) -> list[StoredMessage]:
    """The whole transcript of a session of which Redis has the last five turns only, the last two of them alone."""
    turns = []
    for number in range(TURNS):
        turns.append(await say(stores, SESSION_ID, f"Question {number}", message_id=f"m-{number}", policy=NARROW))
        if number < TURNS - 2:
            await flush()
    assert (await fields_of(stores, SESSION_ID))["first_hot"] not in ("1", str(TURNS))
    return [message for number, turn in enumerate(turns, 1) for message in transcript(turn, number)]


@pytest.fixture
async def without_postgres(settings: Settings, stores: Stores) -> AsyncIterator[History]:
    async with another(settings, "cut-off", database_url="postgresql://127.0.0.1:1/gateway") as cut_off:
        yield history_of(cut_off)


async def page_of(history: History, before: int | None, limit: int) -> MessagePage:
    page = await history.find_messages(SESSION_ID, OWNER, before, limit)
    assert isinstance(page, MessagePage), page
    return page


async def check_every_page(history: History, full: list[StoredMessage]) -> None:
    befores = [None, *range(1, len(full) + 3)]
    for before, limit in product(befores, (1, 2, 3, 5, 8, 13, len(full) - 1, len(full), len(full) + 1)):
        page = await page_of(history, before, limit)
        expected = [message for message in full if before is None or message.seq < before][-limit:]
        assert page.messages == expected, (before, limit)
        oldest = expected[0].seq if expected else 1
        assert page.next_before == (oldest if oldest > 1 else None), (before, limit)


async def test_every_page_is_a_piece_of_the_whole(stores: Stores, full: list[StoredMessage]) -> None:
    await check_every_page(history_of(stores), full)


async def test_every_page_is_the_same_when_all_is_in_postgres(
    stores: Stores, flush: Flush, full: list[StoredMessage]
) -> None:
    await flush()
    await evict(stores, SESSION_ID)
    await check_every_page(history_of(stores), full)


@pytest.mark.parametrize("limit", range(1, 2 * TURNS + 2))
async def test_the_pages_one_after_the_other_are_the_whole(stores: Stores, full: list[StoredMessage], limit: int) -> None:
    history, before = history_of(stores), None
    found: list[StoredMessage] = []
    while True:
        page = await page_of(history, before, limit)
        found = page.messages + found
        before = page.next_before
        if before is None:
            break
    assert found == full


async def test_turns_that_arrive_between_two_pages_leave_no_gap(
    stores: Stores, flush: Flush, full: list[StoredMessage]
) -> None:
    history = history_of(stores)
    page = await page_of(history, None, 3)
    for _ in range(5):
        await say(stores, SESSION_ID, policy=NARROW)
        await flush()
    before = page.next_before
    older = await page_of(history, before, 100)
    assert older.messages + page.messages == full


async def test_without_postgres_there_is_what_redis_has(
    without_postgres: History, full: list[StoredMessage], stores: Stores
) -> None:
    first_hot = (await read(stores, SESSION_ID)).first_hot
    hot = [message for message in full if message.turn >= first_hot]
    page = await page_of(without_postgres, None, 100)
    assert page.messages == hot
    assert page.next_before == hot[0].seq
    assert (await page_of(without_postgres, None, 2)).messages == full[-2:]
    with pytest.raises(PostgresUnavailable):
        await page_of(without_postgres, page.next_before, 100)


async def test_a_dead_letter_is_in_the_transcript_all_the_same(stores: Stores, flush: Flush) -> None:
    turns = [
        await say(stores, SESSION_ID, f"Question {number}", answer="not \0 storable" if number == 1 else "", policy=NARROW)
        for number in range(4)
    ]
    await flush()
    for number in range(4, 9):
        turns.append(await say(stores, SESSION_ID, f"Question {number}", policy=NARROW))
        await flush()
    full = [message for number, turn in enumerate(turns, 1) for message in transcript(turn, number)]
    await check_every_page(history_of(stores), full)


async def test_a_session_without_messages_has_one_empty_page(stores: Stores, flush: Flush) -> None:
    assert await history_of(stores).find_messages(SESSION_ID, OWNER, None, 10) is None
    await open_session(stores, SESSION_ID)
    for _ in range(2):
        assert await page_of(history_of(stores), None, 10) == MessagePage([], None)
        await flush()
    await evict(stores, SESSION_ID)
    assert await page_of(history_of(stores), None, 10) == MessagePage([], None)


@pytest.mark.parametrize("limit", [1, 2, 3, 100])
async def test_the_list_is_the_same_at_every_page_size(stores: Stores, flush: Flush, limit: int) -> None:
    expected: list[str] = []
    for number in range(9):
        session_id = f"{SESSION_ID}_{number}"
        await say(stores, session_id)
        expected.insert(0, session_id)
        if number % 3 != 2:
            await flush()
        if number % 3 == 0:
            await evict(stores, session_id)
    history, position = history_of(stores), None
    found: list[tuple[str, bool]] = []
    while True:
        page = (await history.list_sessions(SessionFilter(), position, limit)).sessions
        found += [(listed.session.session_id, listed.live) for listed in page]
        if len(page) < limit:
            break
        position = page[-1].position
    activity = {name: (await read(stores, name)).session.last_activity_at for name in expected}
    assert sorted(expected, key=lambda name: (activity[name], name), reverse=True) == [name for name, _ in found]
    assert {name for name, live in found if not live} == {f"{SESSION_ID}_{number}" for number in (0, 3, 6)}


async def test_totals_count_each_session_once(stores: Stores, flush: Flush) -> None:
    for number in range(6):
        session_id = f"{SESSION_ID}_{number}"
        await say(stores, session_id)
        if number < 4:
            await flush()
        if number < 2:
            await evict(stores, session_id)
    await say(stores, f"{SESSION_ID}_0")
    await say(stores, f"{SESSION_ID}_3")
    totals = await history_of(stores).load_statistics(None)
    assert (totals.total_sessions, totals.active_sessions, totals.messages, totals.exact) == (6, 6, 16, True)
