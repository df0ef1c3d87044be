"""Redis has forgotten something that Postgres knows: what becomes of the session, before and after somebody notices."""

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import pytest
from structlog.testing import capture_logs
from uuid_utils.compat import uuid7

from gateway.app import Stores
from gateway.settings import Settings
from persistence.model.session import Access
from persistence.postgres.postgres import Postgres
from persistence.redis.epochs import FENCE_JUMP
from persistence.redis.outcomes import Absent, Hot, Refused
from persistence.repair import PLACE_TAKEN
from persistence.sweep import Sweep
from persistence.watch import Watch
from persistence.worker import Worker
from tests.support.layer import new_turn
from tests.support.stored import POLICY, VISITOR, Rows, another, begin, new_session, say, take

Flush = Callable[[], Awaitable[None]]
SESSION_ID = "session_that_redis_forgets"
OWNER = Access(authorized=True, trusted=True)


async def remember(stores: Stores, session_id: str = SESSION_ID) -> Callable[[], Awaitable[None]]:
    """Keeps a session's hash as it is now; called, puts it back, as a rollback does that nobody has noticed."""
    key = stores.keys.session(session_id)
    fields: Any = await stores.client.hgetall(key)

    async def forget() -> None:
        await stores.client.delete(key)
        await stores.client.hset(key, mapping=fields)
        await stores.client.expire(key, 1800)

    return forget


async def notice(stores: Stores) -> None:
    """Begins a new epoch, as when a server was started again."""
    await stores.client.hset(stores.keys.epoch(0), "server", "the one before")
    await stores.scripts._settle_anew(stores.keys.epoch(0))


async def fence_of(stores: Stores) -> int:
    return int(await stores.client.get(stores.keys.fence(0)) or 0)


async def turns(rows: Rows) -> list[tuple[int, int, str]]:
    found = await rows("SELECT turn, seq, content FROM agent_messages WHERE role = 'user' ORDER BY seq")
    return [tuple(row) for row in found]


async def find(stores: Stores, access: Access = OWNER) -> Hot | Refused | None:
    return await stores.hydrator.with_session(SESSION_ID, partial(stores.sessions.read, SESSION_ID, access, 100))


async def shown(stores: Stores) -> list[str]:
    """The visitor's words as Redis has them, compared with Postgres if need be."""
    hot = await find(stores)
    assert isinstance(hot, Hot), hot
    assert [turn.seq for turn in hot.turns] == list(range(1, 2 * len(hot.turns), 2))
    return [turn.messages[0].content for turn in hot.turns]


# ---------------------------------------------------------------------------------------------- noticed before the next turn


async def test_what_postgres_has_comes_back(stores: Stores, flush: Flush) -> None:
    await say(stores, SESSION_ID, "one")
    await flush()
    forget = await remember(stores)
    await say(stores, SESSION_ID, "two", message_id="m-2", context={"seen": 2})
    await flush()
    await forget()
    await notice(stores)
    hot = await find(stores)
    assert isinstance(hot, Hot)
    assert [turn.messages[0].content for turn in hot.turns] == ["one", "two"]
    assert (hot.session.context, hot.session.turns, hot.session.message_count) == ({"seen": 2}, 2, 4)
    assert hot.ttl_ms > 0


async def test_what_only_redis_has_stays(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID, "one")
    await flush()
    await say(stores, SESSION_ID, "two")
    await notice(stores)
    assert await shown(stores) == ["one", "two"]
    await flush()
    assert await turns(rows) == [(1, 1, "one"), (2, 3, "two")]


async def test_a_session_that_postgres_does_not_know_is_as_redis_says(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID, "one")
    await notice(stores)
    assert await shown(stores) == ["one"]
    await flush()
    assert await turns(rows) == [(1, 1, "one")]


async def test_a_healthy_session_is_compared_once_in_an_epoch(
    stores: Stores, flush: Flush, monkeypatch: pytest.MonkeyPatch
) -> None:
    await say(stores, SESSION_ID, "one")
    await flush()
    await notice(stores)
    looks = 0
    look = Postgres.find_session

    async def counted(postgres: Postgres, session_id: str) -> Any:
        nonlocal looks
        looks += 1
        return await look(postgres, session_id)

    monkeypatch.setattr(Postgres, "find_session", counted)
    for number in range(3):
        await say(stores, SESSION_ID, f"{number}")
    assert looks == 1


async def test_records_on_their_way_are_waited_for(stores: Stores, flush: Flush, rows: Rows) -> None:
    """Redis has a turn that it committed on a base that it had forgotten, and nobody has flushed that yet."""
    await say(stores, SESSION_ID, "one")
    await flush()
    forget = await remember(stores)
    await say(stores, SESSION_ID, "two")
    await flush()
    await forget()
    await say(stores, SESSION_ID, "three")
    await notice(stores)
    showing = asyncio.create_task(shown(stores))
    await flush()
    assert await showing == ["one", "two", "three"]
    assert await turns(rows) == [(1, 1, "one"), (2, 3, "two"), (3, 5, "three")]


async def test_a_turn_that_runs_meanwhile_is_committed_behind(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID, "one")
    await flush()
    forget = await remember(stores)
    await say(stores, SESSION_ID, "two")
    await flush()
    await forget()
    turn_id, begun = await begin(stores, SESSION_ID)
    await notice(stores)
    assert await shown(stores) == ["one", "two"]
    assert await stores.sessions.commit(begun, new_turn(begun, turn_id, text="three"), POLICY) is not None
    assert await shown(stores) == ["one", "two", "three"]
    await flush()
    assert await turns(rows) == [(1, 1, "one"), (2, 3, "two"), (3, 5, "three")]


async def test_fences_never_go_back(stores: Stores, flush: Flush) -> None:
    await say(stores, SESSION_ID, "one")
    await flush()
    lost_id, lost = await begin(stores, SESSION_ID)
    await stores.sessions.abort(SESSION_ID, lost_id)
    await stores.client.set(stores.keys.fence(0), lost.fence - 1)
    await notice(stores)
    turn_id, after = await begin(stores, SESSION_ID)
    assert after.fence > lost.fence + FENCE_JUMP / 2
    # One turn was begun of which nobody but this process knows.
    assert (await stores.epochs.read(stores.scripts, 0)).lost == 1
    await stores.sessions.abort(SESSION_ID, turn_id)


async def test_fences_are_above_what_postgres_knows(stores: Stores, flush: Flush) -> None:
    await stores.postgres.raise_marks({0: 7})
    async with stores.postgres.transaction() as transaction:
        await transaction.fetch("mark", 0, 7, 5_000)
    await notice(stores)
    told = await stores.epochs.read(stores.scripts, 0)
    assert told.epoch == 8
    assert await fence_of(stores) > 5_000


async def test_a_redis_that_somebody_emptied_is_settled_again(stores: Stores, flush: Flush) -> None:
    await say(stores, SESSION_ID, "one")
    await flush()
    before = await stores.epochs.read(stores.scripts, 0)
    fence = await fence_of(stores)
    await stores.client.flushall()
    await say(stores, SESSION_ID, "two")
    assert await shown(stores) == ["one", "two"]
    after = await stores.epochs.read(stores.scripts, 0)
    assert after.epoch > before.epoch
    assert await fence_of(stores) > fence


# --------------------------------------------------------------------------------------------------- noticed by the worker


async def test_a_turn_on_a_forgotten_base_is_stored_behind(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID, "one")
    await flush()
    forget = await remember(stores)
    await say(stores, SESSION_ID, "two")
    await flush()
    await forget()
    await say(stores, SESSION_ID, "three")
    await say(stores, SESSION_ID, "four")
    await flush()
    assert await turns(rows) == [(1, 1, "one"), (2, 3, "two"), (3, 5, "three"), (4, 7, "four")]
    (row,) = await rows("SELECT turns, message_count FROM agent_sessions")
    assert tuple(row) == (4, 8)
    assert await stores.outbox.dead_letters() == []
    assert await shown(stores) == ["one", "two", "three", "four"]
    assert (await stores.epochs.read(stores.scripts, 0)).stored_behind == 2
    await say(stores, SESSION_ID, "five")
    await flush()
    assert (await turns(rows))[-1] == (5, 9, "five")


async def test_control_without_the_repair_it_is_a_dead_letter(
    stores: Stores, flush: Flush, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.flusher.PLACE_TAKEN", frozenset())
    await say(stores, SESSION_ID, "one")
    await flush()
    forget = await remember(stores)
    await say(stores, SESSION_ID, "two")
    await flush()
    await forget()
    await say(stores, SESSION_ID, "three")
    await flush()
    (letter,) = await stores.outbox.dead_letters()
    assert letter.fact == "t:2"
    assert PLACE_TAKEN, "the control looks at the right name"
    await stores.sessions.erase(SESSION_ID, OWNER)


async def test_a_repair_that_is_repeated_changes_nothing(stores: Stores, worker: Worker, rows: Rows) -> None:
    """A worker may end between the transaction and the acknowledgement."""
    await say(stores, SESSION_ID, "one")
    assert await worker.drain(10)
    forget = await remember(stores)
    await say(stores, SESSION_ID, "two")
    assert await worker.drain(10)
    await forget()
    await say(stores, SESSION_ID, "three")
    await stores.client.hset(stores.keys.epoch(0), "epoch", 100)
    await worker.flush_once()
    await stores.client.hset(stores.keys.epoch(0), "epoch", 1)
    assert await worker.drain(10)
    assert await turns(rows) == [(1, 1, "one"), (2, 3, "two"), (3, 5, "three")]
    assert await shown(stores) == ["one", "two", "three"]


async def test_two_masters_made_the_same_session(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID, "one")
    key = stores.keys.session(SESSION_ID)
    await flush()
    await stores.client.delete(key)
    absent = await stores.sessions.read(SESSION_ID, OWNER)
    assert isinstance(absent, Absent)
    # The other master could not know: Postgres had nothing yet when it was asked.
    await stores.sessions.open(new_session(SESSION_ID), ticket=absent.ticket)
    await say(stores, SESSION_ID, "two")
    await flush()
    assert await turns(rows) == [(1, 1, "one"), (2, 3, "two")]
    assert len(await rows("SELECT id FROM agent_sessions")) == 1
    assert await shown(stores) == ["one", "two"]
    assert await stores.outbox.dead_letters() == []


async def test_an_erased_session_that_is_back_is_erased_again(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID, "one")
    await flush()
    forget = await remember(stores)
    await stores.sessions.erase(SESSION_ID, OWNER)
    await flush()
    await forget()
    await say(stores, SESSION_ID, "two")
    with capture_logs() as logs:
        await flush()
    assert [line["what"] for line in logs if line["event"] == "session.forgotten"] == ["erased"]
    assert await rows("SELECT 1 FROM agent_sessions") == []
    assert await rows("SELECT 1 FROM agent_messages") == []
    assert not await stores.client.exists(stores.keys.session(SESSION_ID)), "the second tombstone was flushed too"
    assert (await stores.epochs.read(stores.scripts, 0)).erased_again == 1


async def test_an_ended_session_that_speaks_again_ends(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID, "one")
    await flush()
    forget = await remember(stores)
    await stores.sessions.end(SESSION_ID, OWNER)
    await flush()
    await forget()
    for text in ("two", "three"):
        await say(stores, SESSION_ID, text)
    await flush()
    (row,) = await rows("SELECT status, jsonb_array_length(conversation_history) AS history FROM agent_sessions")
    assert tuple(row) == ("ended", 6), "what was answered is in the history"
    hot = await find(stores)
    assert isinstance(hot, Hot)
    assert (hot.session.status, hot.session.turns) == ("ended", 3)


async def test_a_users_session_stays_that_users(stores: Stores, flush: Flush, rows: Rows) -> None:
    await say(stores, SESSION_ID, "one")
    await flush()
    forget = await remember(stores)
    await say(stores, SESSION_ID, "two", user_id="customer-7")
    await flush()
    await forget()
    for text in ("three", "four"):
        await say(stores, SESSION_ID, text)
    await flush()
    assert [row[0] for row in await rows("SELECT external_user_id FROM agent_sessions")] == ["customer-7"]
    stranger = await find(stores, VISITOR)
    assert isinstance(stranger, Refused)
    assert stranger.reason == "foreign"
    assert await shown(stores) == ["one", "two", "three", "four"]


# ------------------------------------------------------------------------------------------------ nobody could look at first


async def test_while_postgres_is_down_a_session_goes_on_and_is_looked_at_later(
    stores: Stores, settings: Settings, flush: Flush
) -> None:
    await say(stores, SESSION_ID, "one")
    await flush()
    forget = await remember(stores)
    await say(stores, SESSION_ID, "two")
    await flush()
    await forget()
    await notice(stores)
    async with another(settings, "cut-off", database_url="postgresql://127.0.0.1:1/gateway") as cut_off:
        assert await shown(cut_off) == ["one"]
    watch = Watch(stores.scripts, stores.settler, of_worker=True)
    await watch.look()
    assert await shown(stores) == ["one", "two"]
    epoch = (await stores.epochs.read(stores.scripts, 0)).epoch
    await watch.look()
    assert (await stores.epochs.read(stores.scripts, 0)).epoch == epoch, "nothing is left to look at"


async def test_a_server_that_nobody_could_settle_is_settled_when_postgres_is_back(
    stores: Stores, settings: Settings, flush: Flush
) -> None:
    await say(stores, SESSION_ID, "one")
    await flush()
    forget = await remember(stores)
    await say(stores, SESSION_ID, "two")
    await flush()
    await forget()
    await stores.client.hset(stores.keys.epoch(0), "server", "the one before")
    async with another(settings, "cut-off", database_url="postgresql://127.0.0.1:1/gateway") as cut_off:
        assert await shown(cut_off) == ["one"]
    async with another(settings, "new") as new:
        assert await shown(new) == ["one", "two"]


async def test_records_of_an_older_epoch_end_the_newer_one(stores: Stores, flush: Flush) -> None:
    """They come from a master that another has taken over from, which does not know of them."""
    await say(stores, SESSION_ID, "one")
    await flush()
    await notice(stores)
    await shown(stores)
    before = (await stores.epochs.read(stores.scripts, 0)).epoch
    async with stores.postgres.transaction() as transaction:
        await transaction.mark(0, before - 1, [])
    await Watch(stores.scripts, stores.settler, of_worker=True).look()
    after = (await stores.epochs.read(stores.scripts, 0)).epoch
    assert after > before
    absent = await stores.sessions.read(SESSION_ID, OWNER)
    assert isinstance(absent, Absent)
    assert absent.held


async def test_records_taken_in_another_epoch_are_not_acknowledged(stores: Stores, worker: Worker) -> None:
    """What has their ids in the new epoch may be something else."""
    await say(stores, SESSION_ID, "one")
    records = await take(stores)
    await notice(stores)
    assert await stores.outbox.mark_flushed(0, records, 1) == 0
    assert (await stores.outbox.backlog(0)).records == 2
    assert await worker.drain(10)


# --------------------------------------------------------------------------------------------- what nobody touches any more


def sweep_of(stores: Stores) -> Sweep:
    return Sweep(stores.scripts, stores.keys, stores.sessions, stores.postgres, stores.hydrator, stores.partitions)


async def test_an_erased_session_is_swept_away_though_nobody_comes_back(stores: Stores, flush: Flush) -> None:
    for session_id in (SESSION_ID, f"{SESSION_ID}_2"):
        await say(stores, session_id, "one")
    await flush()
    forget = await remember(stores)
    await stores.sessions.erase(SESSION_ID, OWNER)
    await flush()
    await forget()
    await stores.client.zadd(stores.keys.live(0), {SESSION_ID: 1})
    await notice(stores)
    assert await sweep_of(stores).run_once() == 1
    await flush()
    assert not await stores.client.exists(stores.keys.session(SESSION_ID))
    assert await stores.client.exists(stores.keys.session(f"{SESSION_ID}_2"))
    assert await sweep_of(stores).run_once() == 0, "once an epoch"


async def test_the_turn_logs_of_an_erased_session_are_swept_away(stores: Stores, flush: Flush) -> None:
    logs = stores.keys.logs(0)
    for session_id in (SESSION_ID, f"{SESSION_ID}_2"):
        turn_id = str(uuid7())
        await stores.client.xadd(stores.keys.events(session_id, turn_id), {"session": session_id})
        await stores.client.expire(stores.keys.events(session_id, turn_id), 300)
        seconds, _ = await stores.client.time()
        await stores.client.hset(logs, session_id, f"{turn_id}@{seconds * 1000 + 300_000}")
    await say(stores, f"{SESSION_ID}_2", "one")
    await flush()
    await stores.client.delete(stores.keys.session(f"{SESSION_ID}_2"))
    await sweep_of(stores).run_once()
    assert await stores.client.hkeys(logs) == [f"{SESSION_ID}_2".encode()], "the other one is in Postgres"
    assert len([key async for key in stores.client.scan_iter("gw:{0}:events:*")]) == 1
