"""How sessions end, time out and come back, and what Postgres keeps of them then."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import msgspec
import pytest

from gateway.app import Stores, build_worker
from gateway.settings import Settings
from persistence.model.session import Access, Session
from persistence.redis.outcomes import Refused
from tests.support.serving import wait_for
from tests.support.stored import (
    AGENT_ID,
    POLICY,
    Rows,
    another,
    evict,
    fields_of,
    flush_records,
    housekeeping_of,
    open_session,
    read,
    say,
    take,
    ttl_of,
)

Flush = Callable[[], Awaitable[None]]
SESSION_ID = "session_of_the_lifecycle"
OWNER = Access(AGENT_ID, authorized=True)
LOCK_TIMEOUTS = 7305102102
DAY_S = 86_400.0


async def stored(rows: Rows, session_id: str = SESSION_ID) -> Any:
    found = await rows("SELECT * FROM agent_sessions WHERE session_id = $1", session_id)
    return found[0]


async def history(rows: Rows, session_id: str = SESSION_ID) -> list[str] | None:
    raw = (await stored(rows, session_id))["conversation_history"]
    return None if raw is None else [message["content"] for message in msgspec.json.decode(raw)]


async def end(stores: Stores, session_id: str = SESSION_ID) -> None:
    assert isinstance(await stores.sessions.end(session_id, OWNER), Session)


async def make_stale(rows: Rows, session_id: str = SESSION_ID) -> None:
    """As if Postgres had heard nothing of the session for two days."""
    await rows("UPDATE agent_sessions SET last_activity_at = now() - interval '2 days' WHERE session_id = $1", session_id)


async def make_idle(stores: Stores, rows: Rows, session_id: str = SESSION_ID) -> None:
    """As if nothing had happened on the session for two days; only what is flushed can be made so."""
    await make_stale(rows, session_id)
    activity = (await stored(rows, session_id))["last_activity_at"].strftime("%Y-%m-%dT%H:%M:%S.000Z")
    if await stores.client.exists(stores.keys.session(session_id)):
        await stores.client.hset(stores.keys.session(session_id), "last_activity_at", activity)


async def time_out(stores: Stores) -> int:
    return await housekeeping_of(stores, DAY_S).time_out()


async def test_while_it_lives_a_session_has_no_conversation_history(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    await flush()
    assert await history(rows) is None


async def test_when_it_ends_its_whole_conversation_is_written(stores: Stores, flush: Flush, rows: Rows) -> None:
    turns = [await say(stores, SESSION_ID, f"Question {number}") for number in range(3)]
    await flush()
    await end(stores)
    await flush()
    row = await stored(rows)
    assert (row["status"], row["ended_at"] is not None, row["message_count"]) == ("ended", True, 6)
    assert msgspec.json.decode(row["conversation_history"]) == [
        {"role": message.role, "content": message.content, "created_at": message.created_at}
        for turn in turns
        for message in turn.messages
    ]


async def test_ending_again_changes_nothing(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    await end(stores)
    await flush()
    before = await stored(rows)
    await end(stores)
    await flush()
    await evict(stores, SESSION_ID)
    await read(stores, SESSION_ID)
    await end(stores)
    await flush()
    assert await stored(rows) == before


async def test_a_turn_that_arrives_after_the_end_is_in_the_history_too(
    settings: Settings, stores: Stores, rows: Rows
) -> None:
    await say(stores, SESSION_ID, "One")
    await flush_records(stores, await take(stores))
    await say(stores, SESSION_ID, "Two")
    late = await take(stores)
    await end(stores)
    async with another(settings) as other:
        await flush_records(other, await take(other))
    assert await history(rows) == ["One", "You said: One"]
    await flush_records(stores, late)
    assert await history(rows) == ["One", "You said: One", "Two", "You said: Two"]
    assert (await stored(rows))["status"] == "ended"


async def test_an_ended_session_stays_ended(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    await end(stores)
    for _ in range(2):
        outcome = await stores.sessions.begin(SESSION_ID, "a turn", OWNER, POLICY)
        assert outcome == Refused("ended")
        await flush()
    await evict(stores, SESSION_ID)
    await read(stores, SESSION_ID)
    assert await stores.sessions.begin(SESSION_ID, "a turn", OWNER, POLICY) == Refused("ended")
    await make_idle(stores, rows)
    await time_out(stores)
    await flush()
    assert (await stored(rows))["status"] == "ended"


async def test_a_session_that_ends_without_a_word_has_an_empty_history(stores: Stores, flush: Flush, rows: Rows) -> None:
    await open_session(stores, SESSION_ID)
    await end(stores)
    await flush()
    assert await history(rows) == []


async def test_an_idle_session_times_out_with_its_whole_conversation(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    await flush()
    await make_idle(stores, rows)
    assert await time_out(stores) == 1
    assert (await stored(rows))["status"] == "active", "the timeout travels through the outbox"
    assert (await fields_of(stores, SESSION_ID))["status"] == "timeout"
    assert await ttl_of(stores, SESSION_ID) == -1
    await flush()
    row = await stored(rows)
    assert (row["status"], row["ended_at"] is not None) == ("timeout", True)
    assert await history(rows) == ["Hello", "You said: Hello"]
    assert await ttl_of(stores, SESSION_ID) > 0
    assert await time_out(stores) == 0


async def test_an_evicted_session_times_out_too(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    await flush()
    await make_idle(stores, rows)
    await evict(stores, SESSION_ID)
    assert await time_out(stores) == 1
    await flush()
    assert (await stored(rows))["status"] == "timeout"
    assert await history(rows) == ["Hello", "You said: Hello"]


async def test_with_one_connection_an_evicted_session_times_out_too(
    settings: Settings, stores: Stores, flush: Flush, rows: Rows
) -> None:
    """GATEWAY_DATABASE_CONNECTIONS=1 is allowed, so the job must not need a second one."""
    await say(stores, SESSION_ID)
    await flush()
    await make_idle(stores, rows)
    await evict(stores, SESSION_ID)
    async with another(settings, database_connections=1) as narrow:
        assert await time_out(narrow) == 1
    await flush()
    assert (await stored(rows))["status"] == "timeout"


@pytest.mark.parametrize("evicted", [False, True])
async def test_who_comes_back_after_a_timeout_goes_on_in_the_same_session(
    stores: Stores, flush: Flush, rows: Rows, evicted: bool
) -> None:
    await say(stores, SESSION_ID, "Before")
    await flush()
    await make_idle(stores, rows)
    await time_out(stores)
    await flush()
    session_uuid = (await stored(rows))["id"]
    if evicted:
        await evict(stores, SESSION_ID)
    await say(stores, SESSION_ID, "Back again")
    await flush()
    row = await stored(rows)
    assert (row["id"], row["status"], row["ended_at"], row["message_count"]) == (session_uuid, "active", None, 4)
    assert row["conversation_history"] is None
    hot = await read(stores, SESSION_ID)
    assert (hot.session.status, hot.session.ended_at) == ("active", "")
    await end(stores)
    await flush()
    assert await history(rows) == ["Before", "You said: Before", "Back again", "You said: Back again"]


async def test_a_timeout_that_is_flushed_after_the_visitor_came_back_changes_nothing(
    settings: Settings, stores: Stores, flush: Flush, rows: Rows
) -> None:
    await say(stores, SESSION_ID, "Before")
    await flush()
    await make_idle(stores, rows)
    await time_out(stores)
    late = await take(stores)
    await say(stores, SESSION_ID, "Back again")
    async with another(settings) as other:
        await flush_records(other, await take(other))
    await flush_records(stores, late)
    row = await stored(rows)
    assert (row["status"], row["ended_at"], row["conversation_history"]) == ("active", None, None)
    assert await ttl_of(stores, SESSION_ID) > 0


async def test_a_session_that_is_active_in_redis_does_not_time_out(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    await flush()
    await say(stores, SESSION_ID, "Not flushed yet")
    await make_stale(rows)
    assert await time_out(stores) == 1, "it was looked at"
    assert (await fields_of(stores, SESSION_ID))["status"] == "active"
    await flush()
    assert (await stored(rows))["status"] == "active"


async def test_a_session_whose_turn_runs_does_not_time_out(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    await flush()
    await make_idle(stores, rows)
    await stores.sessions.begin(SESSION_ID, "a turn", OWNER, POLICY)
    await time_out(stores)
    assert (await fields_of(stores, SESSION_ID))["status"] == "active"
    await stores.sessions.abort(SESSION_ID, "a turn")
    await time_out(stores)
    assert (await fields_of(stores, SESSION_ID))["status"] == "timeout"


async def test_only_one_worker_at_a_time_looks_for_idle_sessions(
    settings: Settings, stores: Stores, flush: Flush, rows: Rows
) -> None:
    await say(stores, SESSION_ID)
    await flush()
    await make_idle(stores, rows)
    connection = await asyncpg.connect(settings.database_url)
    try:
        async with connection.transaction():
            await connection.execute("SELECT pg_advisory_xact_lock($1)", LOCK_TIMEOUTS)
            assert await asyncio.gather(*(time_out(stores) for _ in range(4))) == [0, 0, 0, 0]
            assert (await fields_of(stores, SESSION_ID))["status"] == "active"
    finally:
        await connection.close()
    assert await time_out(stores) == 1


async def test_the_lock_is_held_until_the_job_is_done(
    settings: Settings, stores: Stores, flush: Flush, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    await say(stores, SESSION_ID)
    await flush()
    await make_idle(stores, rows)
    working, go_on = asyncio.Event(), asyncio.Event()
    really = stores.sessions.time_out

    async def slowly(session_id: str, idle_ms: int) -> Any:
        working.set()
        await go_on.wait()
        return await really(session_id, idle_ms)

    monkeypatch.setattr(stores.sessions, "time_out", slowly)
    first = asyncio.create_task(time_out(stores))
    await working.wait()
    async with another(settings) as other:
        assert await time_out(other) == 0
    go_on.set()
    assert await first == 1


async def test_sessions_that_cannot_be_timed_out_do_not_keep_others_from_it(
    stores: Stores, flush: Flush, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longest idle are looked at first, a bounded number at a time: damaged ones stay at the head for ever."""
    monkeypatch.setattr("persistence.housekeeping.TIMEOUTS_BATCH", 3)
    damaged = [f"{SESSION_ID}_damaged_{number}" for number in range(3)]
    for session_id in [*damaged, SESSION_ID]:
        await say(stores, session_id)
    await flush()
    for session_id in damaged:
        await make_idle(stores, rows, session_id)
        await stores.client.hset(stores.keys.session(session_id), "turns", "many")
    await make_idle(stores, rows)
    housekeeping = housekeeping_of(stores, DAY_S)
    for _ in range(5):
        await housekeeping.time_out()
    assert (await fields_of(stores, SESSION_ID))["status"] == "timeout"


async def test_a_running_worker_times_sessions_out(settings: Settings, stores: Stores, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    async with another(settings, "at-work") as own:
        at_work = await build_worker(msgspec.structs.replace(settings, session_timeout_s=0.2), own)
        running = asyncio.create_task(at_work.run())
        try:
            await wait_for(lambda: has_timed_out(rows), "the session times out")
        finally:
            at_work.stop()
            await running
    assert await history(rows) == ["Hello", "You said: Hello"]


async def has_timed_out(rows: Rows) -> bool:
    return bool(await rows("SELECT id FROM agent_sessions WHERE status = 'timeout'"))
