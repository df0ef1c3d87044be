"""Erased means gone, everywhere and for good: also with its turns still queued and workers racing."""

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from time import monotonic
from uuid import UUID

import pytest

from gateway.app import Stores
from gateway.settings import Settings
from persistence.errors import DataRefused, PersistenceError
from persistence.keys import GROUP
from persistence.sessions import Absent, Access, Refused
from tests.support.rule import all_keys
from tests.support.serving import wait_for
from tests.support.stored import (
    AGENT_ID,
    POLICY,
    Rows,
    another,
    begin,
    check_tables,
    contents,
    entries_of,
    evict,
    fields_of,
    flush_records,
    mark,
    members_of,
    read,
    say,
    store_records,
    take,
)

Flush = Callable[[], Awaitable[None]]
SESSION_ID = "session_to_be_erased"
OWNER = Access(AGENT_ID, authorized=True)
ROUNDS_S = 8.0


@pytest.fixture
async def second(settings: Settings, stores: Stores) -> AsyncIterator[Stores]:
    """The stores of a second worker."""
    async with another(settings, "second") as stores_of_second:
        yield stores_of_second


async def erase(stores: Stores, session_id: str = SESSION_ID) -> UUID:
    erased = await stores.hydrator.with_session(session_id, lambda: stores.sessions.erase(session_id, OWNER))
    assert isinstance(erased, str), erased
    return UUID(erased)


async def assert_gone(stores: Stores, rows: Rows, *session_uuids: UUID) -> None:
    """Nothing of the sessions is anywhere: not a key, not a record, not a row but the note that they were erased."""
    for session_uuid in session_uuids:
        assert await rows("SELECT id FROM agent_sessions WHERE id = $1", session_uuid) == []
        assert await rows("SELECT id FROM agent_messages WHERE session_id = $1", session_uuid) == []
        assert await rows("SELECT id FROM erased_sessions WHERE id = $1", session_uuid)
    assert not [key for key in await all_keys(stores.client, stores.keys) if SESSION_ID in key]
    for partition in stores.outbox.partitions:
        for key in (stores.keys.outbox(partition), stores.keys.dead(partition)):
            for _, fields in await entries_of(stores, key):
                assert SESSION_ID.encode() not in b" ".join(fields.values())
        for key in (stores.keys.live(partition), stores.keys.running(partition)):
            for member in await members_of(stores, key):
                assert SESSION_ID.encode() not in member


async def test_an_erased_session_is_gone_everywhere(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    await flush()
    await say(stores, SESSION_ID, "Not flushed")
    session_uuid = await erase(stores)
    await flush()
    await assert_gone(stores, rows, session_uuid)


async def test_its_queued_turns_leave_the_outbox_at_once(stores: Stores, flush: Flush) -> None:
    await say(stores, SESSION_ID, "a secret")
    await say(stores, SESSION_ID, "another secret")
    await erase(stores)
    records = await entries_of(stores, stores.keys.outbox(0))
    assert [fields[b"fact"] for _, fields in records] == [b"erased:4"]
    assert "secret" not in str(await fields_of(stores, SESSION_ID))
    await flush()


async def test_until_postgres_has_erased_it_nobody_finds_it(stores: Stores, flush: Flush) -> None:
    await say(stores, SESSION_ID)
    await flush()
    await erase(stores)
    assert await stores.sessions.read(SESSION_ID, OWNER) == Refused("erased")
    assert await stores.sessions.begin(SESSION_ID, "a turn", OWNER, POLICY) == Refused("erased")
    await flush()
    assert isinstance(await stores.sessions.read(SESSION_ID, OWNER), Absent)


async def test_an_evicted_session_can_be_erased(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    await flush()
    await evict(stores, SESSION_ID)
    session_uuid = await erase(stores)
    await flush()
    await assert_gone(stores, rows, session_uuid)


async def test_its_dead_letters_are_erased_too(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID, answer="not \0 storable")
    await say(stores, f"{SESSION_ID[:10]}_of_another", answer="not \0 storable")
    await flush()
    assert len(await stores.outbox.dead_letters()) == 2
    session_uuid = await erase(stores)
    await flush()
    await assert_gone(stores, rows, session_uuid)
    assert len(await stores.outbox.dead_letters()) == 1


async def test_a_dead_letter_that_was_put_back_is_erased_too(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID, answer="not \0 storable")
    await flush()
    for letter in await stores.outbox.dead_letters():
        await stores.outbox.retry_dead(letter)
    session_uuid = await erase(stores)
    await flush()
    await assert_gone(stores, rows, session_uuid)


async def test_erasing_twice_is_harmless(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    assert await erase(stores) == await erase(stores)
    await flush()
    assert len(await rows("SELECT id FROM erased_sessions")) == 1


async def test_a_turn_that_runs_meanwhile_is_not_committed(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    turn_id, begun = await begin(stores, SESSION_ID)
    session_uuid = await erase(stores)
    turn = begun.turns[-1]
    assert await stores.sessions.commit(SESSION_ID, turn_id, begun.fence, 2, turn, POLICY) is None
    await flush()
    await assert_gone(stores, rows, session_uuid)


async def test_a_damaged_session_can_be_erased(stores: Stores, flush: Flush, rows: Rows) -> None:
    for number, field in enumerate(("turns", "format", "unflushed", "agent_id", "started_at", "revision", "first_hot")):
        session_id = f"{SESSION_ID}_{number}"
        await say(stores, session_id)
        await flush()
        await say(stores, session_id, "Not flushed")
        await stores.client.hdel(stores.keys.session(session_id), field)
        erased = await stores.sessions.erase(session_id, Access(authorized=True))
        assert isinstance(erased, str), field
        await flush()
        assert await rows("SELECT id FROM agent_sessions WHERE id = $1", UUID(erased)) == [], field
        assert await stores.client.exists(stores.keys.session(session_id)) == 0, field
    assert await stores.outbox.dead_letters() == []


# ------------------------------------------------------------------------------------------------------- it never reappears


async def test_what_a_worker_still_held_does_not_bring_it_back(
    stores: Stores, second: Stores, flush: Flush, rows: Rows
) -> None:
    await say(stores, SESSION_ID)
    held = await take(second)
    session_uuid = await erase(stores)
    await flush()
    await flush_records(second, held)
    await flush()
    await assert_gone(stores, rows, session_uuid)


async def test_without_the_note_of_erased_sessions_it_would_come_back(
    stores: Stores, second: Stores, flush: Flush, rows: Rows
) -> None:
    """The control of the test above: the statements without the check."""
    for name in ("upsert_sessions", "insert_messages"):
        statement = second.postgres._statements[name]
        lines = [line for line in statement.splitlines() if "FROM erased_sessions" not in line]
        second.postgres._statements[name] = "\n".join(lines)
        assert second.postgres._statements[name] != statement
    await say(stores, SESSION_ID)
    held = await take(second)
    session_uuid = await erase(stores)
    await flush()
    await flush_records(second, held)
    assert await rows("SELECT id FROM agent_sessions WHERE id = $1", session_uuid)
    assert await contents(rows, SESSION_ID) == ["Hello", "You said: Hello"]


async def test_an_erasure_waits_for_flushes_that_have_begun(stores: Stores, second: Stores, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    held = await take(second)
    session_uuid = await erase(stores)
    erasure = await take(stores)
    async with second.postgres.transaction(20) as transaction:
        await transaction.flush(held)
        erasing = asyncio.create_task(store_records(stores, erasure))
        await wait_for(lambda: waits_for_a_lock(rows), "the erasure waits")
        assert not erasing.done()
    await erasing
    await mark(stores, erasure)
    await mark(second, held)
    await assert_gone(stores, rows, session_uuid)


async def waits_for_a_lock(rows: Rows) -> bool:
    return bool(await rows("SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"))


async def test_a_pod_that_stalled_while_hydrating_does_not_bring_it_back(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    await flush()
    await evict(stores, SESSION_ID)
    absent = await stores.sessions.read(SESSION_ID, OWNER)
    assert isinstance(absent, Absent)
    snapshot = await stores.postgres.find_snapshot(SESSION_ID, 25)
    assert snapshot is not None
    session_uuid = await erase(stores)
    assert not await stores.sessions.hydrate(snapshot, absent.ticket, 1800)
    await flush()
    assert not await stores.sessions.hydrate(snapshot, absent.ticket, 1800)
    await assert_gone(stores, rows, session_uuid)


async def test_a_new_session_under_the_same_id_is_a_fresh_one(
    stores: Stores, second: Stores, flush: Flush, rows: Rows
) -> None:
    await say(stores, SESSION_ID, "Old")
    held = await take(second)
    old_uuid = await erase(stores)
    await flush()
    await say(stores, SESSION_ID, "New")
    await flush_records(second, held)
    await flush()
    hot = await read(stores, SESSION_ID)
    assert hot.session.id != str(old_uuid)
    assert (hot.session.turns, hot.session.message_count) == (1, 2)
    assert await contents(rows, SESSION_ID) == ["New", "You said: New"]
    await check_tables(rows)


async def test_racing_workers_that_die_at_random_never_bring_it_back(
    settings: Settings, stores: Stores, flush: Flush, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As many rounds as there is time for: turns are said, two workers take, store and mark, and die in between."""
    monkeypatch.setattr("persistence.outbox.CLAIM_IDLE_MS", 1)
    monkeypatch.setattr("persistence.worker.CLAIM_EVERY_S", 0.0)
    seed = random.randrange(10**9)
    chance = random.Random(seed)
    deadline = monotonic() + ROUNDS_S
    erased: list[UUID] = []

    async def works(own: Stores) -> None:
        for _ in range(3):
            records = await take(own, chance.randint(1, 5), claim=chance.random() < 0.5)
            await asyncio.sleep(chance.choice((0, 0.001, 0.003)))
            if not records or chance.random() < 0.3:
                continue
            try:
                await store_records(own, records)
            except DataRefused as error:
                # Both insert the same new session at the same moment; a worker tries again, this one counts as dead.
                assert error.constraint == "idx_sessions_session_id"
                continue
            await asyncio.sleep(chance.choice((0, 0.001, 0.003)))
            if chance.random() < 0.7:
                await mark(own, records)

    async def visits(session_id: str) -> None:
        for _ in range(chance.randint(1, 3)):
            await say(stores, session_id)
        await asyncio.sleep(chance.choice((0, 0.001, 0.005)))
        erased.append(await erase(stores, session_id))

    async with another(settings, "a") as a, another(settings, "b") as b:
        rounds = 0
        while monotonic() < deadline:
            rounds += 1
            visitors = [visits(f"{SESSION_ID}_{rounds}_{number}") for number in range(3)]
            await asyncio.gather(works(a), works(b), *visitors)
            if rounds % 10 == 0 or monotonic() >= deadline:
                await wait_for(lambda: drained(stores, flush), f"everything is flushed, seed {seed}")
                assert await rows("SELECT id FROM agent_sessions") == [], f"seed {seed}, round {rounds}"
    await assert_gone(stores, rows, *erased)
    assert rounds > 10


async def drained(stores: Stores, flush: Flush) -> bool:
    await flush()
    waiting = await stores.client.xlen(stores.keys.outbox(0))
    pending = (await stores.client.xpending(stores.keys.outbox(0), GROUP))["pending"]
    return not waiting and not pending


async def test_an_erasure_survives_that_postgres_is_away(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    await flush()
    await rows("ALTER TABLE erased_sessions RENAME TO elsewhere")
    session_uuid = await erase(stores)
    try:
        records = await take(stores)
        with pytest.raises(PersistenceError):
            await store_records(stores, records)
        assert await stores.sessions.read(SESSION_ID, OWNER) == Refused("erased")
    finally:
        await rows("ALTER TABLE elsewhere RENAME TO erased_sessions")
    await flush_records(stores, records)
    await assert_gone(stores, rows, session_uuid)
