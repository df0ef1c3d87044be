"""The write-behind worker: exactly once, in any order, around poison, and through the death of a worker at any step."""

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import asyncpg
import msgspec
import pytest

from gateway.app import Stores, build_worker
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisCluster
from gateway.settings import Settings
from persistence.errors import DataRefused, PostgresUnavailable
from persistence.model.codec import decode_record
from persistence.model.session import Access, Record
from persistence.postgres.migrate import load_migrations, migrate
from persistence.postgres.postgres import Forgotten, Postgres, Transaction
from persistence.redis.keys import GROUP
from persistence.worker import Worker
from tests.support.links import Link
from tests.support.serving import wait_for
from tests.support.stored import (
    Rows,
    another,
    another_worker,
    check_tables,
    contents,
    entries_of,
    evict,
    fields_of,
    flush_records,
    mark,
    open_session,
    say,
    store_records,
    take,
    ttl_of,
)

Flush = Callable[[], Awaitable[None]]
SESSION_ID = "session_of_the_worker"
POISON = "nothing \0 stored"


@pytest.fixture
async def second(settings: Settings, stores: Stores) -> AsyncIterator[Stores]:
    """The stores of a second worker."""
    async with another(settings, "second") as stores_of_second:
        yield stores_of_second


@pytest.fixture
def claim_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker counts as dead after a millisecond, and is looked for in every round."""
    monkeypatch.setattr("persistence.redis.outbox.CLAIM_IDLE_MS", 1)
    monkeypatch.setattr("persistence.worker.CLAIM_EVERY_S", 0.0)


async def outbox_length(stores: Stores) -> int:
    return int(await stores.client.xlen(stores.keys.outbox(0)))


async def pending(stores: Stores) -> int:
    return int((await stores.client.xpending(stores.keys.outbox(0), GROUP))["pending"])


# ------------------------------------------------------------------------------------------------- one batch, exactly once


async def test_a_batch_is_one_transaction(stores: Stores, worker: Worker, rows: Rows) -> None:
    for number in range(3):
        await say(stores, f"{SESSION_ID}_{number}")
        await say(stores, f"{SESSION_ID}_{number}")
    assert await worker.flush_once() == 9
    found = await rows("SELECT xmin::text FROM agent_sessions UNION ALL SELECT xmin::text FROM agent_messages")
    assert len(found) == 15
    assert len({row["xmin"] for row in found}) == 1


async def test_many_records_are_several_transactions_and_each_session_is_in_one(
    stores: Stores, worker: Worker, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.flusher.PART", 4)
    for _ in range(3):
        for number in range(4):
            await say(stores, f"{SESSION_ID}_{number}")
    assert await worker.flush_once() == 16
    found = await rows("SELECT s.id, m.xmin::text FROM agent_sessions s JOIN agent_messages m ON m.session_id = s.id")
    transactions = {(row["id"], row["xmin"]) for row in found}
    assert (len(found), len(transactions), len({xmin for _, xmin in transactions})) == (24, 4, 4)
    await check_tables(rows)


@pytest.mark.parametrize("in_hand", [2, 1])
async def test_the_next_batch_is_taken_while_one_is_on_its_way(
    stores: Stores, worker: Worker, rows: Rows, monkeypatch: pytest.MonkeyPatch, in_hand: int
) -> None:
    """Control: with one batch at a time the first waits in vain for the second."""
    monkeypatch.setattr("persistence.worker.BATCH", 1)
    monkeypatch.setattr("persistence.worker.IN_HAND", in_hand)
    await say(stores, SESSION_ID)
    flush, begun, both = Transaction.flush, 0, asyncio.Event()

    async def waiting(transaction: Transaction, records: Sequence[Record]) -> list[Forgotten]:
        nonlocal begun
        begun += 1
        if begun == 2:
            both.set()
        elif begun == 1:
            await asyncio.wait_for(both.wait(), 10 if in_hand == 2 else 0.2)
        return await flush(transaction, records)

    monkeypatch.setattr(Transaction, "flush", waiting)
    assert await worker.drain(0.1 if in_hand == 1 else 20) == (in_hand == 2)
    monkeypatch.setattr(Transaction, "flush", flush)
    assert await worker.drain(10)
    await check_tables(rows)
    assert await contents(rows, SESSION_ID) == ["Hello", "You said: Hello"]


async def test_a_record_that_was_deleted_while_it_was_taken_keeps_no_other_back(stores: Stores) -> None:
    outbox = stores.keys.outbox(0)
    await say(stores, SESSION_ID)
    taken = await stores.outbox.take(0, 100)
    assert taken.entries
    await stores.client.xdel(outbox, *[entry for entry, _ in taken.entries])
    await say(stores, f"{SESSION_ID}_2")
    new = await stores.outbox.take(0, 100)
    assert len(new.entries) == 2
    assert not {entry for entry, _ in new.entries} & {entry for entry, _ in taken.entries}
    await flush_records(stores, [decode_record(entry, fields) for entry, fields in new.entries])


async def test_full_batches_do_not_wait_for_each_other_nor_a_worker_that_is_stopped(
    stores: Stores, worker: Worker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.worker.BATCH", 2)
    monkeypatch.setattr("persistence.worker.FLUSH_EVERY_S", 3600.0)
    for _ in range(4):
        await say(stores, SESSION_ID)
    async with asyncio.timeout(20):
        running = asyncio.create_task(worker.run())
        await wait_for(lambda: is_flushed(stores), "all five records are flushed")
        await say(stores, SESSION_ID)
        worker.stop()
        await running
        assert await worker.drain(10)
    assert await outbox_length(stores) == 0


async def is_flushed(stores: Stores) -> bool:
    return await outbox_length(stores) == 0


@pytest.mark.parametrize("guarded", [True, False])
async def test_workers_that_flush_the_same_records_at_once_wait_for_each_other_in_one_order(
    stores: Stores, second: Stores, rows: Rows, guarded: bool
) -> None:
    """Control: without the order they soon wait for each other in a circle.

    With it one may still be refused for the unique key that ON CONFLICT does not name; the worker then tries again.
    """
    if not guarded:
        for own in (stores, second):
            statement = own.postgres.statements["flush"]
            unordered = statement.replace("ORDER BY session_id, seq", "").replace("ORDER BY record.id", "")
            own.postgres.statements["flush"] = unordered
    for number in range(40):
        await say(stores, f"{SESSION_ID}_{number}")
    records = await take(stores)
    met = False
    for _ in range(20 if guarded else 300):
        outcomes = await asyncio.gather(
            store_records(stores, records), store_records(second, records[::-1]), return_exceptions=True
        )
        errors = [str(outcome) for outcome in outcomes if outcome]
        assert all(re.search("Deadlock|Unique", error) for error in errors), errors
        met = any("Deadlock" in error for error in errors)
        if met:
            break
        await rows("TRUNCATE agent_sessions CASCADE")
    assert met != guarded
    await flush_records(stores, records)
    await check_tables(rows)


async def test_an_error_is_raised_when_no_transaction_runs_any_more(
    stores: Stores, worker: Worker, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is taken again next must not be on its way to Postgres at the same time."""
    monkeypatch.setattr("persistence.flusher.PART", 2)
    await say(stores, SESSION_ID)
    await say(stores, f"{SESSION_ID}_slow")
    flush = Transaction.flush

    async def troubled(transaction: Transaction, records: Sequence[Record]) -> list[Forgotten]:
        if records[0].session.session_id == SESSION_ID:
            raise ConnectionResetError
        return await flush(transaction, records)

    monkeypatch.setattr(Transaction, "flush", troubled)
    with pytest.raises(PostgresUnavailable):
        await worker.flush_once()
    assert await pending(stores) == 2
    assert (await contents(rows, f"{SESSION_ID}_slow"), await contents(rows, SESSION_ID)) == (
        ["Hello", "You said: Hello"],
        [],
    )
    monkeypatch.setattr(Transaction, "flush", flush)
    assert await worker.flush_once() == 2
    assert await contents(rows, SESSION_ID) == ["Hello", "You said: Hello"]


async def test_what_a_transaction_does_not_end_leaves_no_trace(stores: Stores, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    records = await take(stores)
    with pytest.raises(DataRefused):
        async with stores.postgres.transaction() as transaction:
            await transaction.flush(records)
            raise ValueError
    assert await rows("SELECT id FROM agent_sessions") == []
    await flush_records(stores, records)
    assert len(await contents(rows, SESSION_ID)) == 2


async def test_flushing_the_same_records_twice_changes_nothing(stores: Stores, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    await say(stores, SESSION_ID, "And again")
    records = await take(stores)
    await store_records(stores, records)
    tables = "SELECT to_jsonb(s) AS row FROM {} s ORDER BY 1"
    before = [await rows(tables.format(table)) for table in ("agent_sessions", "agent_messages")]
    await store_records(stores, records)
    await store_records(stores, records[-1:])
    await store_records(stores, records[:1])
    assert [await rows(tables.format(table)) for table in ("agent_sessions", "agent_messages")] == before
    assert await rows("SELECT message_count FROM agent_sessions WHERE message_count = 4")
    assert await mark(stores, records) == 3
    assert await mark(stores, records) == 0


async def updates_of(transaction: Transaction) -> tuple[int, int]:
    """How many rows of sessions the transaction has changed, and how many of these changed no index."""
    counts = "pg_stat_get_xact_tuples_updated(oid) AS updated, pg_stat_get_xact_tuples_hot_updated(oid) AS hot"
    found = await transaction._connection.fetch(f"SELECT {counts} FROM pg_class WHERE relname = 'agent_sessions'")
    return found[0]["updated"], found[0]["hot"]


@pytest.mark.parametrize(("index", "hot"), [("SELECT 1", 1), ("CREATE INDEX ON agent_sessions (last_activity_at)", 0)])
async def test_a_turn_changes_its_sessions_row_once_and_no_index(stores: Stores, index: str, hot: int) -> None:
    """Control: with an index on the activity itself it would change them all."""
    await say(stores, SESSION_ID)
    opened, turn = await take(stores)
    opened.session.last_activity_at, turn.session.last_activity_at = "2026-01-01T00:01:00.000Z", "2026-01-01T00:02:00.000Z"
    await store_records(stores, [opened])
    with pytest.raises(DataRefused):
        async with stores.postgres.transaction(30) as transaction:
            await transaction.run(index)
            await transaction.flush([turn])
            assert await updates_of(transaction) == (1, hot)
            raise ValueError
    await flush_records(stores, [opened, turn])


async def test_without_the_guards_flushing_twice_doubles_the_messages(
    stores: Stores, postgres_server: PostgresServer, rows: Rows
) -> None:
    """The control of the test above: on a database without the unique keys, with the statement without ON CONFLICT."""
    url = await asyncio.to_thread(postgres_server.create_database, "unguarded")
    postgres = Postgres(url, timeout_s=30)
    await migrate(postgres, load_migrations())
    statement = postgres.statements["flush"]
    postgres.statements["flush"] = statement.replace("ON CONFLICT (id) DO NOTHING", "")
    await say(stores, SESSION_ID)
    records = await take(stores)
    async with postgres.transaction() as transaction:
        await transaction.run("ALTER TABLE agent_messages DROP CONSTRAINT agent_messages_pkey")
        await transaction.run("DROP INDEX idx_messages_session; TRUNCATE agent_sessions CASCADE")
    for _ in range(2):
        async with postgres.transaction() as transaction:
            await transaction.flush(records)
    async with postgres.transaction() as transaction:
        found = await transaction._connection.fetch("SELECT message_count FROM agent_sessions")
        doubled = await transaction._connection.fetch("SELECT id FROM agent_messages")
    await postgres.close()
    assert found[0]["message_count"] == len(doubled) == 4
    await flush_records(stores, records)


async def test_a_worker_killed_after_the_transaction_and_before_its_mark_doubles_nothing(
    settings: Settings, stores: Stores, second: Stores, rows: Rows, claim_at_once: None
) -> None:
    await say(stores, SESSION_ID)
    await store_records(second, await take(second))
    assert await outbox_length(stores) == 2
    assert await ttl_of(stores, SESSION_ID) == -1

    async def claimed() -> bool:
        worker = await build_worker(settings, stores)
        return await worker.flush_once() > 0

    await wait_for(claimed, "the dead worker's records are claimed")
    assert len(await contents(rows, SESSION_ID)) == 2
    await check_tables(rows)
    assert await ttl_of(stores, SESSION_ID) > 0
    assert await outbox_length(stores) == 0


async def test_acknowledged_before_the_transaction_records_would_be_lost(
    settings: Settings, stores: Stores, second: Stores, rows: Rows, flush: Flush, claim_at_once: None
) -> None:
    """The control of the test above: the other order, and the same death in the middle."""
    await say(stores, SESSION_ID)
    await mark(second, await take(second))
    await flush()
    assert await contents(rows, SESSION_ID) == []


async def test_entries_of_a_dead_worker_are_claimed(
    stores: Stores, second: Stores, worker: Worker, rows: Rows, claim_at_once: None
) -> None:
    await say(stores, SESSION_ID)
    assert len(await take(second)) == 2
    await say(stores, SESSION_ID, "After its death")
    await wait_for(worker.flush_once, "something is flushed")
    await wait_for(lambda: flushed_all(worker, stores), "all of it is flushed")
    assert len(await contents(rows, SESSION_ID)) == 4
    await check_tables(rows)
    assert await pending(stores) == 0


async def flushed_all(worker: Worker, stores: Stores) -> bool:
    await worker.flush_once()
    return await outbox_length(stores) == 0


async def test_entries_of_a_worker_that_lives_are_left_to_it(
    stores: Stores, second: Stores, worker: Worker, rows: Rows
) -> None:
    await say(stores, SESSION_ID)
    taken = await take(second)
    assert await worker.flush_once() == 0
    assert await rows("SELECT id FROM agent_sessions") == []
    await flush_records(second, taken)


async def test_many_workers_and_many_deaths_leave_everything_once_and_in_order(
    settings: Settings, stores: Stores, rows: Rows, flush: Flush, claim_at_once: None
) -> None:
    sessions = [f"{SESSION_ID}_{number}" for number in range(5)]

    async def works(number: int) -> None:
        """Takes, and dies before the transaction, after it, or not at all."""
        async with another(settings, f"worker-{number}") as own:
            records = await take(own, 3, claim=number % 2 == 0)
            if number % 3 and records:
                await store_records(own, records)
            if number % 3 == 2 and records:
                await mark(own, records)

    async def talks(session_id: str) -> None:
        for number in range(6):
            await say(stores, session_id, f"Question {number}")

    await asyncio.gather(*map(talks, sessions), *map(works, range(12)))
    await wait_for(lambda: drained(flush, stores), "everything is flushed")
    expected = [text for number in range(6) for text in (f"Question {number}", f"You said: Question {number}")]
    for session_id in sessions:
        assert await contents(rows, session_id) == expected
        assert await ttl_of(stores, session_id) > 0
    await check_tables(rows)


async def drained(flush: Flush, stores: Stores) -> bool:
    await flush()
    return await outbox_length(stores) == 0


# ------------------------------------------------------------------------------------------------------------ out of order


async def test_a_later_turn_that_is_flushed_first_ends_right(
    stores: Stores, second: Stores, flush: Flush, rows: Rows
) -> None:
    await open_session(stores, SESSION_ID)
    await flush()
    await say(stores, SESSION_ID, "One", context={"step": 1})
    first_turn = await take(stores)
    await say(stores, SESSION_ID, "Two", context={"step": 2})
    second_turn = await take(second)
    assert [record.fact for record in first_turn + second_turn] == ["t:1", "t:2"]

    await flush_records(second, second_turn)
    fields = await fields_of(stores, SESSION_ID)
    assert fields["flushed"] == "0"
    assert fields["unflushed"].startswith("t:1@")
    assert await ttl_of(stores, SESSION_ID) == -1
    assert (await rows("SELECT turns, message_count FROM agent_sessions"))[0] == (2, 2)

    await flush_records(stores, first_turn)
    fields = await fields_of(stores, SESSION_ID)
    assert (fields["flushed"], fields["unflushed"]) == ("2", "")
    assert await ttl_of(stores, SESSION_ID) > 0
    found = await rows("SELECT turns, message_count, context_data->>'step' FROM agent_sessions")
    assert tuple(found[0]) == (2, 4, "2")
    assert await contents(rows, SESSION_ID) == ["One", "You said: One", "Two", "You said: Two"]
    await check_tables(rows)


async def test_a_turn_that_is_flushed_after_the_end_does_not_bring_the_session_back(
    stores: Stores, second: Stores, rows: Rows
) -> None:
    turn = await say(stores, SESSION_ID, "One")
    before = await take(stores)
    await stores.sessions.end(SESSION_ID, Access(authorized=True))
    await flush_records(second, await take(second))
    found = (await rows("SELECT status, ended_at, conversation_history FROM agent_sessions"))[0]
    assert (found["status"], found["conversation_history"]) == ("ended", "[]")
    assert await ttl_of(stores, SESSION_ID) == -1

    await flush_records(stores, before)
    found = (await rows("SELECT status, ended_at, conversation_history FROM agent_sessions"))[0]
    history = msgspec.json.decode(found["conversation_history"])
    assert (found["status"], found["ended_at"] is not None) == ("ended", True)
    assert [message["content"] for message in history] == [message.content for message in turn.messages]
    assert await ttl_of(stores, SESSION_ID) > 0


# ------------------------------------------------------------------------------------------------ own pending records first


async def test_a_worker_that_starts_again_under_its_name_begins_with_what_it_had(
    settings: Settings, stores: Stores, rows: Rows
) -> None:
    await say(stores, SESSION_ID, "Taken before")
    assert len(await take(stores)) == 2
    await say(stores, SESSION_ID, "New")
    worker = await build_worker(settings, stores)
    assert await worker.flush_once() == 2
    assert await contents(rows, SESSION_ID) == ["Taken before", "You said: Taken before"]
    assert await worker.flush_once() == 1
    assert len(await contents(rows, SESSION_ID)) == 4


async def test_after_an_error_a_worker_goes_on_with_what_it_had(stores: Stores, worker: Worker, rows: Rows) -> None:
    await say(stores, SESSION_ID, "Before")
    await rows("ALTER TABLE agent_messages RENAME TO elsewhere")
    try:
        with pytest.raises(PostgresUnavailable):
            await worker.flush_once()
        await say(stores, SESSION_ID, "Meanwhile")
        with pytest.raises(PostgresUnavailable):
            await worker.flush_once()
    finally:
        await rows("ALTER TABLE elsewhere RENAME TO agent_messages")
    assert await worker.flush_once() == 2
    assert await contents(rows, SESSION_ID) == ["Before", "You said: Before"]
    assert await worker.flush_once() == 1
    assert await stores.outbox.dead_letters() == []


async def test_records_whose_reply_was_lost_are_not_left_lying(settings: Settings, stores: Stores, rows: Rows) -> None:
    """Redis had given them to this worker, which never saw them; nobody else would for 10 s."""
    async with (
        Link(settings.redis_url) as link,
        another_worker(settings, "behind-a-link", redis_url=link.url) as worker,
    ):
        await worker.drain(5)
        await say(stores, SESSION_ID)
        link.lose_replies = 1
        await worker.drain(5)
        assert link.lose_replies == 0
        assert len(await contents(rows, SESSION_ID)) == 2


async def test_a_worker_goes_on_when_redis_came_back_empty(stores: Stores, worker: Worker, rows: Rows) -> None:
    await worker.drain(5)
    await stores.client.flushall()
    await say(stores, SESSION_ID)
    assert await worker.drain(3)
    assert len(await contents(rows, SESSION_ID)) == 2


# ------------------------------------------------------------------------------------------------------------------ poison


async def test_one_poison_record_among_fifty_delays_nobody(stores: Stores, worker: Worker, rows: Rows) -> None:
    for number in range(25):
        await say(stores, f"{SESSION_ID}_{number}", answer=POISON if number == 13 else "fine")
    assert await worker.flush_once() == 50
    assert await outbox_length(stores) == 0
    assert (await rows("SELECT count(*) FROM agent_messages"))[0][0] == 48
    [letter] = await stores.outbox.dead_letters()
    assert (letter.session_id, letter.fact) == (f"{SESSION_ID}_13", "t:1")
    assert "CharacterNotInRepertoire" in letter.reason
    for number in range(25):
        assert (await ttl_of(stores, f"{SESSION_ID}_{number}") == -1) == (number == 13)
    await check_tables(rows)


@pytest.mark.parametrize(("refusals", "buried"), [(2, 0), (1_000, 2)])
async def test_a_record_that_another_worker_inserts_at_the_same_moment_is_tried_again(
    stores: Stores, worker: Worker, rows: Rows, monkeypatch: pytest.MonkeyPatch, refusals: int, buried: int
) -> None:
    """Refused as a batch, then once alone, it arrives; what is refused for good is a dead letter."""
    await say(stores, SESSION_ID)
    flush, tries = Transaction.flush, 0

    async def refused(transaction: Transaction, records: Sequence[Record]) -> list[Forgotten]:
        nonlocal tries
        tries += 1
        if tries <= refusals:
            raise asyncpg.UniqueViolationError
        return await flush(transaction, records)

    monkeypatch.setattr(Transaction, "flush", refused)
    await worker.flush_once()
    assert len(await stores.outbox.dead_letters()) == buried
    assert len(await rows("SELECT id FROM agent_messages")) == (0 if buried else 2)


async def test_several_poisons_are_each_found(stores: Stores, worker: Worker, rows: Rows) -> None:
    poisoned = {0, 1, 7, 24}
    for number in range(25):
        await say(stores, f"{SESSION_ID}_{number}", answer=POISON if number in poisoned else "fine")
    assert await worker.flush_once() == 50
    assert (await rows("SELECT count(*) FROM agent_messages"))[0][0] == 42
    letters = await stores.outbox.dead_letters()
    assert {letter.session_id for letter in letters} == {f"{SESSION_ID}_{number}" for number in poisoned}
    assert len(letters) == 4
    assert await worker.flush_once() == 0


@pytest.mark.parametrize(
    "poison",
    [
        {"context": {"note": "\0"}},
        {"metadata": {"note": "\0"}},
        {"message_id": "m" * 256},
        {"user_id": "\0"},
        {"ip_address": "1" * 46},
        {"website_domain": "d" * 256},
    ],
    ids="-".join,
)
async def test_whatever_the_poison_is_other_sessions_go_on(
    stores: Stores, worker: Worker, rows: Rows, poison: dict[str, Any]
) -> None:
    await say(stores, f"{SESSION_ID}_before")
    await say(stores, SESSION_ID, **poison)
    await say(stores, f"{SESSION_ID}_after")
    await worker.flush_once()
    assert len(await contents(rows, f"{SESSION_ID}_before")) == len(await contents(rows, f"{SESSION_ID}_after")) == 2
    assert {letter.session_id for letter in await stores.outbox.dead_letters()} == {SESSION_ID}
    assert await ttl_of(stores, SESSION_ID) == -1
    assert await outbox_length(stores) == 0


def nested(depth: int) -> str:
    return '{"a":' * depth + "1" + "}" * depth


@pytest.mark.parametrize(
    "changes",
    [
        {"turn": "{not json"},
        {"turn": '{"id":"x"}'},
        {"turn": b"\xff\xfe"},
        {"turn": None},
        {"context": "[]"},
        {"context": nested(20_000)},
        {"format": "0"},
        {"status": "asleep"},
        {"channel": "fax"},
        {"id": "not a uuid"},
        {"agent_id": ""},
        {"started_at": "yesterday"},
        {"turns": "many"},
        {"turns": 2**40},
        {"started_at": "0001-01-01T00:00:00.000+23:00"},
        {"fact": "t:one"},
        {"fact": "t:-1"},
        {"fact": "t: 1"},
        {"fact": "ended 1"},
        {"fact": ""},
        {"fact": None},
        {"fact": b"\xff"},
        {"session_id": None},
    ],
    ids=lambda changes: "-".join(f"{name}={str(value)[:20]}" for name, value in changes.items()),
)
async def test_a_record_that_cannot_be_read_is_put_aside_with_its_reason(
    stores: Stores, worker: Worker, rows: Rows, changes: dict[str, Any]
) -> None:
    await say(stores, f"{SESSION_ID}_before")
    await say(stores, SESSION_ID)
    key = stores.keys.outbox(0)
    entry, fields = (await entries_of(stores, key))[-1]
    damaged: dict[str, Any] = {name.decode(): value for name, value in fields.items()}
    session = msgspec.json.decode(damaged["session"])
    for name, value in changes.items():
        if name in session and name not in damaged:
            session[name] = msgspec.Raw(value.encode()) if name == "context" else value
        else:
            damaged[name] = value
    damaged["session"] = msgspec.json.encode(session)
    await stores.client.xdel(key, entry)
    await stores.client.xadd(key, {name: value for name, value in damaged.items() if value is not None})
    await say(stores, f"{SESSION_ID}_after")

    assert await worker.flush_once() == 6
    assert len(await contents(rows, f"{SESSION_ID}_before")) == len(await contents(rows, f"{SESSION_ID}_after")) == 2
    [letter] = await stores.outbox.dead_letters()
    assert letter.reason
    assert await outbox_length(stores) == 0
    assert await pending(stores) == 0
    assert await worker.flush_once() == 0
    assert await ttl_of(stores, SESSION_ID) == -1


async def test_what_is_not_the_datas_fault_puts_nothing_aside(stores: Stores, worker: Worker, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    for trouble, remedy in (
        ("ALTER TABLE agent_sessions RENAME TO elsewhere", "ALTER TABLE elsewhere RENAME TO agent_sessions"),
        ("ALTER TABLE agent_messages RENAME seq TO place", "ALTER TABLE agent_messages RENAME place TO seq"),
        ("ALTER DATABASE gateway SET default_transaction_read_only = on", "ALTER DATABASE gateway RESET ALL"),
    ):
        await rows(trouble)
        try:
            await worker._flusher._postgres.close()
            with pytest.raises(PostgresUnavailable):
                await worker.flush_once()
        finally:
            await rows("SET default_transaction_read_only = off")
            await rows(remedy)
    await worker._flusher._postgres.close()
    assert await stores.outbox.dead_letters() == []
    assert await worker.drain(5)
    assert len(await contents(rows, SESSION_ID)) == 2


@pytest.mark.parametrize(
    "url",
    [
        "postgresql://127.0.0.1:1/gateway",
        "postgresql://127.0.0.1:54x2/gateway",
        "postgresql://postgres@database..example/gateway",
        "postgresql://user:half#of@127.0.0.1/gateway",
        "postgresql://127.0.0.1:1/gateway?sslmode=sometimes",
        "{}_not_there",
    ],
)
async def test_a_wrong_database_url_puts_nothing_aside(
    settings: Settings, stores: Stores, rows: Rows, flush: Flush, claim_at_once: None, url: str
) -> None:
    await say(stores, SESSION_ID)
    async with another_worker(settings, "misled", database_url=url.format(settings.database_url)) as misled:
        with pytest.raises(PostgresUnavailable):
            await misled.flush_once()
    assert await stores.outbox.dead_letters() == []
    await wait_for(lambda: drained(flush, stores), "another worker flushes it")
    assert len(await contents(rows, SESSION_ID)) == 2


# ------------------------------------------------------------------------------------------------------------ dead letters


@pytest.fixture
async def strict(rows: Rows) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """A rule of the table that can be lifted: no answer may contain the word `forbidden`."""
    lift = "ALTER TABLE agent_messages DROP CONSTRAINT IF EXISTS no_forbidden_word"
    await rows("ALTER TABLE agent_messages ADD CONSTRAINT no_forbidden_word CHECK (content NOT LIKE '%forbidden%')")

    async def lift_it() -> None:
        await rows(lift)

    yield lift_it
    await rows(lift)


async def retry_all(stores: Stores) -> None:
    for letter in await stores.outbox.dead_letters():
        assert await stores.outbox.retry_dead(letter)
        assert not await stores.outbox.retry_dead(letter)


async def test_dead_letters_arrive_when_they_are_retried(
    stores: Stores, flush: Flush, rows: Rows, strict: Callable[[], Awaitable[None]]
) -> None:
    await say(stores, SESSION_ID, "One", answer="forbidden")
    await say(stores, SESSION_ID, "Two")
    await say(stores, SESSION_ID, "Three", answer="forbidden too")
    await flush()
    assert await contents(rows, SESSION_ID) == ["Two", "You said: Two"]
    assert (await fields_of(stores, SESSION_ID))["flushed"] == "0"
    assert "no_forbidden_word" in (await stores.outbox.dead_letters())[0].reason

    await retry_all(stores)
    await flush()
    assert len(await stores.outbox.dead_letters()) == 2
    assert await ttl_of(stores, SESSION_ID) == -1

    await strict()
    await retry_all(stores)
    assert await ttl_of(stores, SESSION_ID) == -1
    await flush()
    expected = ["One", "forbidden", "Two", "You said: Two", "Three", "forbidden too"]
    assert await contents(rows, SESSION_ID) == expected
    await check_tables(rows)
    assert (await fields_of(stores, SESSION_ID))["flushed"] == "3"
    assert await ttl_of(stores, SESSION_ID) > 0
    assert await stores.outbox.dead_letters() == []
    await evict(stores, SESSION_ID)
    await say(stores, SESSION_ID, "Four")
    await flush()
    assert len(await contents(rows, SESSION_ID)) == 8


async def test_a_letter_that_lacks_a_field_can_be_retried_like_any_other(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    key = stores.keys.outbox(0)
    entry, fields = (await entries_of(stores, key))[-1]
    await stores.client.xdel(key, entry)
    await stores.client.xadd(key, {name: value for name, value in fields.items() if name != b"fact"})
    await flush()
    [letter] = await stores.outbox.dead_letters()
    assert await stores.outbox.retry_dead(letter)
    await flush()
    assert len(await stores.outbox.dead_letters()) == 1


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisCluster]:
    with RedisCluster(tmp_path_factory.mktemp("cluster"), [free_port() for _ in range(3)]) as cluster:
        yield cluster


@pytest.mark.parametrize("lacking", ["turn", "session_id"])
async def test_on_a_cluster_too_a_record_that_cannot_be_read_is_put_aside(
    settings: Settings, cluster: RedisCluster, rows: Rows, lacking: str, tmp_path: Path
) -> None:
    """Its session id may be what cannot be read, and with it the slot."""
    changed = msgspec.structs.replace(settings, redis_url=cluster.url, partitions=16)
    stores = Stores(changed)
    try:
        await stores.check()
        await stores.client.flushall()
        worker = await build_worker(changed, stores)
        await say(stores, SESSION_ID)
        partition = stores.keys.partition(SESSION_ID)
        assert partition != stores.keys.partition("")
        key = stores.keys.outbox(partition)
        entry, fields = (await entries_of(stores, key))[-1]
        await stores.client.xdel(key, entry)
        await stores.client.xadd(key, {name: value for name, value in fields.items() if name != lacking.encode()})
        await worker.drain(2)
        [letter] = await stores.outbox.dead_letters()
        assert letter.partition == partition
        assert await rows("SELECT id FROM agent_sessions")
        assert await stores.outbox.retry_dead(letter)
    finally:
        await stores.close()
