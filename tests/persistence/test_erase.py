"""Erased means gone, everywhere and for good: also with its turns still queued and workers racing."""

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial
from uuid import UUID

import pytest

from gateway.app import Stores, build_worker
from gateway.settings import Settings
from persistence.errors import PersistenceError
from persistence.model.session import Access, Message, Turn
from persistence.model.times import iso
from persistence.postgres.postgres import Transaction
from persistence.redis.keys import GROUP
from persistence.redis.log_entries import LoggedEvent, Part
from persistence.redis.outbox import CLAIM_IDLE_MS
from persistence.redis.outcomes import Absent, Begun, Refused
from persistence.tasks import gather_bounded
from persistence.worker import Worker
from tests.support.layer import new_turn
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
    ttl_of,
)

Flush = Callable[[], Awaitable[None]]
SESSION_ID = "session_to_be_erased"
OWNER = Access(AGENT_ID, authorized=True)


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
    for partition in range(stores.keys.partitions):
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
    assert await stores.sessions.commit(begun, new_turn(begun, turn_id), POLICY) is None
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
    without_the_note(second.postgres.statements)
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


async def test_without_the_lock_a_flush_that_has_begun_would_bring_it_back(
    stores: Stores, second: Stores, rows: Rows
) -> None:
    """The control of the test above: the erasure does not wait."""
    stores.postgres.statements["lock_erase"] = "SELECT 1"
    await say(stores, SESSION_ID)
    held = await take(second)
    session_uuid = await erase(stores)
    erasure = await take(stores)
    async with second.postgres.transaction(20) as transaction:
        await transaction.flush(held)
        await store_records(stores, erasure)
    await mark(stores, erasure)
    await mark(second, held)
    assert await rows("SELECT id FROM agent_sessions WHERE id = $1", session_uuid)


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


@pytest.fixture
def restless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that hardly pause, so that they meet often."""
    monkeypatch.setattr("persistence.worker.FLUSH_EVERY_S", 0.03)


Tamper = Callable[[dict[str, str]], None]


class Race:
    """Rounds in which a visitor talks and is erased at a random moment, while two workers work, stall before and in
    their transactions, die and start again. `tamper` may take a guard out of the workers' statements."""

    def __init__(self, settings: Settings, stores: Stores, tamper: Tamper = lambda _: None) -> None:
        self.seed = random.randrange(10**9)
        self._chance = random.Random(self.seed)
        self._settings = settings
        self._stores = stores
        self._tamper = tamper
        self.erased: list[UUID] = []
        self.seen: Counter[str] = Counter()
        self._holding = False

    async def run(self, rounds: int, at_once: int = 8) -> None:
        """All rounds, and then until nothing waits any more."""
        racing = asyncio.Event()
        async with another(self._settings, "a") as a, another(self._settings, "b") as b:
            workers = [asyncio.create_task(self._works(own, racing)) for own in (a, b)]
            await gather_bounded((self._visits(f"{SESSION_ID}_{number}") for number in range(rounds)), at_once)
            racing.set()
            await asyncio.gather(*workers)
            for _ in range(2):
                for own in (a, b):
                    worker = await build_worker(self._settings, own)
                    await wait_for(lambda worker=worker: drained(self._stores, worker), f"all is flushed, seed {self.seed}")

    async def _works(self, own: Stores, racing: asyncio.Event) -> None:
        """One worker after the other under the same name, each until it is killed."""
        self._tamper(own.postgres.statements)
        transaction = own.postgres.transaction

        @asynccontextmanager
        async def stalling(timeout_s: float | None = None) -> AsyncIterator[Transaction]:
            await self._be_overtaken()
            async with transaction(timeout_s) as open_transaction:
                yield open_transaction
                await self._a_moment()
            self.seen["transactions"] += 1

        own.postgres.transaction = stalling  # type: ignore[method-assign]
        while not racing.is_set():
            working = asyncio.create_task((await build_worker(self._settings, own)).run())
            await asyncio.wait({asyncio.create_task(racing.wait())}, timeout=0.05 + self._chance.random() * 0.5)
            working.cancel()
            await asyncio.gather(working, return_exceptions=True)
            self.seen["deaths"] += 1
        own.postgres.transaction = transaction  # type: ignore[method-assign]

    async def _be_overtaken(self) -> None:
        """Holds what was taken until a session has been erased and the other worker has gone on, or for half a second."""
        if self._holding or self._chance.random() < 0.3:
            return
        self._holding = True
        try:
            erased, done = len(self.erased), self.seen["transactions"]
            for _ in range(50):
                if len(self.erased) > erased and self.seen["transactions"] > done:
                    self.seen["overtaken"] += 1
                    return
                await asyncio.sleep(0.01)
        finally:
            self._holding = False

    async def _a_moment(self) -> None:
        await asyncio.sleep(self._chance.choice((0, 0, 0.003, 0.01, 0.05, 0.1)))

    async def _visits(self, session_id: str) -> None:
        stores, chance = self._stores, self._chance
        poisoned = False
        for _ in range(chance.randint(1, 3)):
            if chance.random() < 0.2:
                poisoned = True
                self.seen["poison"] += 1
            await say(stores, session_id, answer="not \0 storable" if poisoned else "")
            await self._a_moment()
            if chance.random() < 0.3:
                await wait_for(partial(self._is_settled, session_id), f"{session_id} is flushed, seed {self.seed}")
            if chance.random() < 0.5:
                for letter in await stores.outbox.dead_letters():
                    self.seen["retried"] += await stores.outbox.retry_dead(letter)
            if await ttl_of(stores, session_id) > 0 and chance.random() < 0.5:
                await stores.client.delete(stores.keys.session(session_id))
                self.seen["evicted"] += 1
        settled = not (await fields_of(stores, session_id)).get("unflushed")
        snapshot = await stores.postgres.find_snapshot(session_id, 25) if settled else None
        late = await begin(stores, session_id) if chance.random() < 0.5 else None
        if late:
            await self._log(session_id, *late)
        await self._a_moment()
        records = len((await fields_of(stores, session_id)).get("unflushed", "").split())
        self.seen["erased while queued"] += bool(records)
        self.erased.append(await erase(stores, session_id))
        await self._a_moment()
        # Whoever was slow: the pod that runs a turn, and one that read the session from Postgres.
        if late:
            turn_id, begun = late
            turn = Turn(turn_id, None, 1, [Message(turn_id, "user", "late", iso(begun.now_ms))])
            assert await stores.sessions.commit(begun, turn, POLICY) is None
            await self._log(session_id, *late)
        if snapshot:
            assert not await stores.sessions.hydrate(snapshot, begun.fence if late else 1, 1800)

    async def _is_settled(self, session_id: str) -> bool:
        fields = await fields_of(self._stores, session_id)
        return not fields["unflushed"] or bool(fields.get("dead"))

    async def _log(self, session_id: str, turn_id: str, begun: Begun) -> None:
        await self._stores.turn_logs.append(session_id, turn_id, begun.fence, Part(0, [LoggedEvent(1, "text.delta", b"{}")]))

    async def check(self, rows: Rows) -> None:
        """Nothing of any of the sessions is anywhere."""
        for table in ("agent_sessions", "agent_messages"):
            assert await rows(f"SELECT * FROM {table}") == [], f"came back to {table}, seed {self.seed}"
        left = [key for key in await all_keys(self._stores.client, self._stores.keys) if "events" in key or "ticket" in key]
        assert left == [], f"seed {self.seed}"
        await assert_gone(self._stores, rows, *self.erased)


@pytest.mark.parametrize("claim_idle_ms", [1, CLAIM_IDLE_MS])
async def test_in_200_rounds_racing_workers_that_die_at_random_never_bring_it_back(
    settings: Settings, stores: Stores, rows: Rows, monkeypatch: pytest.MonkeyPatch, restless: None, claim_idle_ms: int
) -> None:
    """Also when they take from each other whatever they can get."""
    monkeypatch.setattr("persistence.redis.outbox.CLAIM_IDLE_MS", claim_idle_ms)
    monkeypatch.setattr("persistence.worker.CLAIM_EVERY_S", claim_idle_ms / 2000)
    race = Race(settings, stores)
    await race.run(200)
    await race.check(rows)
    assert len(race.erased) == 200
    # All that makes it hard has happened.
    for what, least in {"transactions": 50, "overtaken": 10, "deaths": 10, "poison": 20, "retried": 1, "evicted": 5}.items():
        assert race.seen[what] >= least, race.seen
    assert race.seen["erased while queued"] >= 20, race.seen


def without_the_note(statements: dict[str, str]) -> None:
    lines = statements["flush"].splitlines()
    kept = [line for line in lines if "NOT IN (SELECT id FROM erased)" not in line]
    assert len(kept) == len(lines) - 2
    statements["flush"] = "\n".join(kept)


async def test_without_the_note_the_same_race_brings_it_back(
    settings: Settings, stores: Stores, rows: Rows, restless: None
) -> None:
    """Control: usually within the first 100 rounds."""
    for _ in range(6):
        await Race(settings, stores, without_the_note).run(50)
        if await rows("SELECT id FROM agent_sessions"):
            return
    raise AssertionError("nothing came back")


async def drained(stores: Stores, worker: Worker) -> bool:
    assert await worker.drain(10)
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
