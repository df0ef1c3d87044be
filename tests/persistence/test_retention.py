"""Sessions that are older than their agent keeps them are erased, as if by hand; all others stay."""

import asyncio
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import asyncpg
import pytest
from structlog.testing import capture_logs

from gateway.app import Stores, build_worker
from gateway.settings import Settings
from persistence.model.agents import Agent, AgentDefinition
from persistence.model.session import Access
from persistence.postgres.statements import load_statements
from persistence.redis.log_entries import LoggedEvent, Part
from tests.support.pods import rewrite
from tests.support.rule import all_keys
from tests.support.serving import wait_for
from tests.support.stored import (
    AGENT_ID,
    Rows,
    another,
    begin,
    contents,
    entries_of,
    evict,
    fields_of,
    flush_records,
    housekeeping_of,
    members_of,
    open_session,
    read,
    say,
    take,
)

Flush = Callable[[], Awaitable[None]]
OTHER_AGENT = "01890000-0000-7000-8000-000000000002"
OLD, YOUNG, FOREIGN = "session_that_is_old", "session_that_is_young", "session_of_another_agent"
OWNER = Access(AGENT_ID, authorized=True)
LOCK_RETENTION = 7305102103
DAY_S = 86_400.0


@pytest.fixture(autouse=True)
async def agents(stores: Stores) -> None:
    """An agent that keeps sessions for 30 days, and one that keeps them for good."""
    keeps = AgentDefinition(graph="echo", retention_days=30)
    await stores.postgres.put_agent(Agent(AGENT_ID, "shop", keeps))
    await stores.postgres.put_agent(Agent(OTHER_AGENT, "bank", AgentDefinition(graph="echo")))


async def age(stores: Stores, rows: Rows, session_id: str, days: float, *, in_redis: bool = True) -> None:
    """As if nothing had happened on a session for so many days."""
    found = await rows(
        "UPDATE agent_sessions SET last_activity_at = now() - make_interval(secs => $2) WHERE session_id = $1 "
        "RETURNING last_activity_at",
        session_id,
        days * DAY_S,
    )
    key = stores.keys.session(session_id)
    if in_redis and await stores.client.exists(key):
        await stores.client.hset(key, "last_activity_at", found[0][0].strftime("%Y-%m-%dT%H:%M:%S.000Z"))


async def retain(stores: Stores) -> int:
    return await housekeeping_of(stores, DAY_S).retain()


async def kept(rows: Rows) -> set[str]:
    return {row["session_id"] for row in await rows("SELECT session_id FROM agent_sessions")}


async def is_gone(stores: Stores, rows: Rows, session_id: str = OLD) -> bool:
    """Whether nothing of a session is left in either store."""
    messages = await rows("SELECT content FROM agent_messages WHERE content LIKE $1", f"%{session_id}%")
    records = str([await entries_of(stores, key(0)) for key in (stores.keys.outbox, stores.keys.dead)])
    lists = str([await members_of(stores, key(0)) for key in (stores.keys.live, stores.keys.running)])
    keys = [key for key in await all_keys(stores.client, stores.keys) if session_id in key]
    return not (keys or messages or session_id in records + lists or session_id in await kept(rows))


async def test_old_sessions_go_and_young_ones_and_other_agents_stay(stores: Stores, flush: Flush, rows: Rows) -> None:
    for session_id in (OLD, YOUNG):
        await say(stores, session_id, f"words in {session_id}")
    await open_session(stores, FOREIGN, agent_id=OTHER_AGENT)
    await flush()
    await age(stores, rows, OLD, 30.1)
    await age(stores, rows, YOUNG, 29.9)
    await age(stores, rows, FOREIGN, 3000)
    with capture_logs() as logs:
        assert await retain(stores) == 1
    assert logs == [{"event": "retention.erased", "log_level": "info", "agent": "shop", "sessions": 1, "kept": 0}]
    await flush()
    assert await is_gone(stores, rows)
    assert await kept(rows) == {YOUNG, FOREIGN}
    assert await contents(rows, YOUNG) == [f"words in {YOUNG}", f"You said: words in {YOUNG}"]
    assert await retain(stores) == 0


@pytest.mark.parametrize("how", ["ended", "evicted"])
async def test_one_that_has_ended_or_left_redis_goes_too(stores: Stores, flush: Flush, rows: Rows, how: str) -> None:
    await say(stores, OLD, f"words in {OLD}")
    if how == "ended":
        await stores.sessions.end(OLD, OWNER)
    await flush()
    await age(stores, rows, OLD, 31)
    if how == "evicted":
        await evict(stores, OLD)
    await retain(stores)
    await flush()
    assert await is_gone(stores, rows)


async def test_one_of_a_known_user_and_one_that_needs_its_token_go_too(stores: Stores, flush: Flush, rows: Rows) -> None:
    """Whoever may open a session: the worker may erase it."""
    await open_session(stores, OLD, user_id="user-17", minted=True)
    await flush()
    await age(stores, rows, OLD, 31)
    await retain(stores)
    await flush()
    assert await is_gone(stores, rows)


async def test_the_logs_of_its_turns_go_too(stores: Stores, flush: Flush, rows: Rows) -> None:
    turn_id, begun = await begin(stores, OLD)
    await stores.turn_logs.append(OLD, turn_id, begun.fence, Part(0, [LoggedEvent(1, "text.delta", b"{}")]))
    await stores.sessions.abort(OLD, turn_id, begun.fence)
    await flush()
    assert await stores.client.exists(stores.keys.events(OLD, turn_id))
    await age(stores, rows, OLD, 31)
    await retain(stores)
    await flush()
    assert await is_gone(stores, rows)
    assert not await stores.client.exists(stores.keys.events(OLD, turn_id))


async def test_turns_that_are_queued_when_it_becomes_due_do_not_bring_it_back(
    settings: Settings, stores: Stores, flush: Flush, rows: Rows
) -> None:
    """One record waits in the outbox, another has been taken by a worker that is slow."""
    await say(stores, OLD, f"flushed words in {OLD}")
    await flush()
    await say(stores, OLD, f"words in {OLD} that a worker holds")
    held = await take(stores)
    await say(stores, OLD, f"words in {OLD} that wait")
    await age(stores, rows, OLD, 31)
    async with another(settings) as other:
        assert await retain(other) == 1
        assert len(held) == 1
        await flush_records(stores, held)
    await flush()
    assert await is_gone(stores, rows)


async def test_the_held_record_would_bring_it_back_if_postgres_forgot_what_was_erased(
    settings: Settings, stores: Stores, flush: Flush, rows: Rows
) -> None:
    """The control."""
    await say(stores, OLD)
    await flush()
    await say(stores, OLD, f"words in {OLD} that a worker holds")
    held = await take(stores)
    await age(stores, rows, OLD, 31)
    async with another(settings) as other:
        await retain(other)
        worker = await build_worker(settings, other)
        assert await worker.drain(10)
    await rows("DELETE FROM erased_sessions")
    await flush_records(stores, held)
    assert not await is_gone(stores, rows)


async def test_one_that_is_live_again_stays(stores: Stores, flush: Flush, rows: Rows) -> None:
    """Postgres has not heard of what happened since: Redis knows."""
    await say(stores, OLD)
    await flush()
    await age(stores, rows, OLD, 31)
    await evict(stores, OLD)
    await say(stores, OLD, "I am back")
    assert await retain(stores) == 1, "it was looked at"
    await flush()
    assert await contents(rows, OLD) == ["Hello", "You said: Hello", "I am back", "You said: I am back"]
    assert await retain(stores) == 0


async def test_one_whose_turn_runs_stays_until_that_is_over(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, OLD)
    await flush()
    await age(stores, rows, OLD, 31)
    turn_id, begun = await begin(stores, OLD)
    await retain(stores)
    assert (await fields_of(stores, OLD))["status"] == "active"
    await stores.sessions.abort(OLD, turn_id, begun.fence)
    await retain(stores)
    assert (await fields_of(stores, OLD))["status"] == "erased"
    await flush()


async def test_without_its_guard_one_that_is_live_again_would_be_erased(stores: Stores, flush: Flush, rows: Rows) -> None:
    """The control."""
    rewrite(
        stores.scripts,
        "erase",
        lambda text: text.replace("if args.idle_ms ~= '' then\n  local last", "if false then\n  local last"),
    )
    await say(stores, OLD)
    await flush()
    await age(stores, rows, OLD, 31)
    await say(stores, OLD, "I am back")
    await retain(stores)
    assert (await fields_of(stores, OLD))["status"] == "erased"
    await flush()


async def test_two_workers_erase_each_session_once(settings: Settings, stores: Stores, flush: Flush, rows: Rows) -> None:
    for number in range(10):
        await say(stores, f"{OLD}_{number}")
    await flush()
    for number in range(10):
        await age(stores, rows, f"{OLD}_{number}", 31)
    async with another(settings) as other:
        with capture_logs() as logs:
            for _ in range(3):
                await asyncio.gather(retain(stores), retain(other))
    assert sum(line["sessions"] for line in logs) == 10
    await flush()
    assert await kept(rows) == set()


async def test_only_one_worker_at_a_time_looks_for_old_sessions(
    settings: Settings, stores: Stores, flush: Flush, rows: Rows
) -> None:
    await say(stores, OLD)
    await flush()
    await age(stores, rows, OLD, 31)
    connection = await asyncpg.connect(settings.database_url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK_RETENTION)
            assert await retain(stores) == 0
            assert (await fields_of(stores, OLD))["status"] == "active"
    finally:
        await connection.close()
    assert await retain(stores) == 1
    await flush()


async def test_sessions_that_cannot_be_erased_do_not_keep_others(
    stores: Stores, flush: Flush, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The oldest are looked at first, a bounded number at a time: those that Postgres has only in part stay at the head."""
    monkeypatch.setattr("persistence.housekeeping.RETENTION_BATCH", 3)
    damaged = [f"{OLD}_damaged_{number}" for number in range(3)]
    for session_id in [*damaged, OLD, YOUNG]:
        await say(stores, session_id)
    await flush()
    for session_id in damaged:
        await age(stores, rows, session_id, 40)
        await evict(stores, session_id)
        await rows(
            "DELETE FROM agent_messages USING agent_sessions s WHERE s.id = agent_messages.session_id AND s.session_id = $1",
            session_id,
        )
    await age(stores, rows, OLD, 31)
    housekeeping = housekeeping_of(stores, DAY_S)
    for _ in range(2):
        await housekeeping.retain()
    await flush()
    assert await kept(rows) == {*damaged, YOUNG}


async def test_the_limit_is_the_agents_own_and_counts_from_when_it_is_set(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, OLD)
    await flush()
    await age(stores, rows, OLD, 5)
    assert await retain(stores) == 0
    await stores.postgres.put_agent(Agent(AGENT_ID, "shop", AgentDefinition(graph="echo", retention_days=4)))
    assert await retain(stores) == 1
    await flush()
    assert await is_gone(stores, rows)


async def test_with_one_connection_it_works_too(settings: Settings, stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, OLD)
    await flush()
    await age(stores, rows, OLD, 31)
    await evict(stores, OLD)
    async with another(settings, database_connections=1) as narrow:
        assert await retain(narrow) == 1
    await flush()
    assert await is_gone(stores, rows)


async def test_a_running_worker_erases_what_is_old(settings: Settings, stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, OLD)
    await say(stores, YOUNG)
    await flush()
    await age(stores, rows, OLD, 31)
    async with another(settings, "at-work") as own:
        at_work = await build_worker(settings, own)
        running = asyncio.create_task(at_work.run())
        try:
            await wait_for(lambda: _only(rows, YOUNG), "the old session goes")
        finally:
            at_work.stop()
            await running
    assert (await read(stores, YOUNG)).session.message_count == 2


async def _only(rows: Rows, session_id: str) -> bool:
    return await kept(rows) == {session_id}


async def test_the_index_serves_the_search(rows: Rows) -> None:
    """On a table too small for an index Postgres reads all of it, unless told not to."""
    await rows("SET enable_seqscan = off")
    await rows("SET enable_bitmapscan = off")
    await rows("BEGIN")
    await rows("DROP INDEX idx_sessions_activity, idx_sessions_agent_id")
    statement = load_statements()["old_sessions"].replace("SELECT", "EXPLAIN SELECT", 1)
    after = datetime(2026, 1, 1, tzinfo=UTC)
    plan: list[Any] = await rows(statement, UUID(AGENT_ID), timedelta(days=30), after, "", 100)
    await rows("ROLLBACK")
    text = "\n".join(row[0] for row in plan)
    assert "idx_sessions_retention" in text
    assert "active_in > " in text
    assert "Presorted Key: active_in" in text
