"""The Redis layer: what every operation does, what it replies, and that repeating it changes nothing."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from importlib.resources import files
from typing import Any

import msgspec
import pytest
from uuid_utils.compat import uuid7

from gateway.dev.servers.redis import RedisServer
from persistence.errors import CommandRefused, Damaged, NotReplicated
from persistence.model.agents import Agent, AgentDefinition, TurnPolicy
from persistence.model.fields import SESSION_FIELDS
from persistence.model.session import Access, Session, Snapshot
from persistence.model.times import iso, ms_of
from persistence.redis import keys
from persistence.redis.agent_copies import AgentCopies
from persistence.redis.connection import Client
from persistence.redis.keys import GROUP
from persistence.redis.linking import link_scripts
from persistence.redis.log_entries import LoggedEvent, Part
from persistence.redis.outcomes import Absent, Begun, Busy, Committed, Hot, Opened, Queued, Refused, Replay
from persistence.redis.pool import Argument
from persistence.redis.probe import Probe
from persistence.redis.scripts import Scripts
from persistence.redis.sessions import SessionStore
from persistence.redis.shared_limits import DayUpdate, LimitUpdate, RateUpdate, RunningUpdate, SharedLimits
from persistence.redis.turn_logs import TurnLogs
from tests.support.layer import (
    ACCESS,
    AGENT_ID,
    DOMAIN,
    OPERATOR,
    POLICY,
    Layer,
    messages_of,
    new_id,
    new_session,
    new_turn,
    redis_layer,
)
from tests.support.rule import all_keys, breaches
from tests.support.serving import wait_for

LUA = files("persistence") / "lua"
OTHER_AGENT = "01900000-0000-7000-8000-00000000a9e2"
STRANGERS = [
    pytest.param(Access(OTHER_AGENT, DOMAIN), id="of another agent"),
    pytest.param(Access(AGENT_ID, "other.example"), id="from another domain"),
]


@pytest.fixture
async def layer(redis_server: RedisServer) -> AsyncIterator[Layer]:
    async with redis_layer(redis_server.url) as layer:
        yield layer


def with_policy(**changed: Any) -> TurnPolicy:
    return msgspec.structs.replace(POLICY, **changed)


# ----------------------------------------------------------------------------------------------------------------- open


async def test_an_id_that_a_browser_made_up_needs_a_ticket(layer: Layer) -> None:
    new = new_session(new_id())
    absent = await layer.sessions.open(new)
    assert isinstance(absent, Absent)
    assert not await layer.client.exists(layer.keys.session(new.session_id))
    opened = await layer.sessions.open(new, ticket=absent.ticket)
    assert isinstance(opened, Opened)
    assert opened.created
    assert opened.session.user_agent == new.user_agent
    assert opened.session.metadata == {"page": "/"}


async def test_a_ticket_is_good_for_one_session_only(layer: Layer) -> None:
    mine, other = new_session(new_id()), new_session(new_id())
    given = await layer.sessions.open(mine)
    assert isinstance(given, Absent)
    assert isinstance(await layer.sessions.open(other, ticket=given.ticket), Absent)


async def test_all_who_ask_share_a_ticket_and_the_first_uses_it_up(layer: Layer) -> None:
    first, second = new_session(new_id()), new_session("")
    second = msgspec.structs.replace(second, session_id=first.session_id)
    given, again = await layer.sessions.open(first), await layer.sessions.open(second)
    assert isinstance(given, Absent)
    assert given == again
    opened = await layer.sessions.open(first, ticket=given.ticket)
    assert isinstance(opened, Opened)
    assert opened.created
    found = await layer.sessions.open(second, ticket=given.ticket)
    assert isinstance(found, Opened)
    assert not found.created
    assert found.session.id == first.id


async def test_a_ticket_that_was_used_up_is_no_good_after_the_session_has_left(layer: Layer) -> None:
    new = new_session(new_id())
    given = await layer.sessions.open(new)
    assert isinstance(given, Absent)
    await layer.sessions.open(new, ticket=given.ticket)
    await layer.flush()
    await layer.evict(new.session_id)
    late = await layer.sessions.open(new_session(new.session_id), ticket=given.ticket)
    assert isinstance(late, Absent)
    assert late.ticket > given.ticket


async def test_a_minted_id_is_opened_at_once(layer: Layer) -> None:
    opened = await layer.sessions.open(new_session(new_id(), minted=True))
    assert isinstance(opened, Opened)
    assert opened.session.minted


async def test_a_session_that_is_there_is_found_and_not_replaced(layer: Layer) -> None:
    session = await layer.open()
    await layer.chat(session.session_id)
    found = await layer.sessions.open(new_session(session.session_id, channel="voice"))
    assert isinstance(found, Opened)
    assert not found.created
    assert (found.session.id, found.session.channel, found.session.turns) == (session.id, "text", 1)


async def test_opening_a_session_of_somebody_else_is_refused(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    for changed in ({"agent_id": OTHER_AGENT}, {"website_domain": "other.example"}):
        assert await layer.sessions.open(new_session(session_id, **changed)) == Refused("foreign")


async def test_a_minted_session_is_found_with_its_token_only(layer: Layer) -> None:
    session = await layer.open(minted=True)
    new = new_session(session.session_id, minted=True)
    assert await layer.sessions.open(new) == Refused("unauthorized")
    found = await layer.sessions.open(new, authorized=True)
    assert isinstance(found, Opened)
    assert not found.created


async def test_a_repeated_open_finds_its_own_session_without_a_token(layer: Layer) -> None:
    new = new_session(new_id(), minted=True)
    first, second = await layer.sessions.open(new), await layer.sessions.open(new)
    assert first == second
    assert isinstance(second, Opened)
    assert second.created


async def test_a_full_backlog_refuses_new_sessions(redis_server: RedisServer) -> None:
    async with redis_layer(redis_server.url, max_backlog=2) as layer:
        await layer.open()
        await layer.open()
        assert await layer.sessions.open(new_session(new_id(), minted=True)) == Refused("backlog_full")


# ---------------------------------------------------------------------------------------------------------------- begin


async def test_beginning_on_an_unknown_session_gives_a_ticket(layer: Layer) -> None:
    session_id = new_id()
    first = await layer.sessions.begin(session_id, "a", ACCESS, POLICY)
    second = await layer.sessions.begin(session_id, "a", ACCESS, POLICY)
    assert isinstance(first, Absent)
    assert first == second, "all who ask while it is absent share one"
    assert not await layer.client.exists(layer.keys.session(session_id))


async def test_a_turn_gets_the_session_and_its_newest_turns(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    turns = [await layer.chat(session_id, f"message {n}") for n in range(1, 6)]
    begun, _ = await layer.begin(session_id, policy=with_policy(hot_turns=3))
    assert begun.history == messages_of(turns[2:])
    assert begun.session.message_count == 10
    assert abs(begun.now_ms - await layer.redis_ms()) < 5000


async def test_fences_only_grow(layer: Layer) -> None:
    fences = []
    for _ in range(3):
        session_id = (await layer.open()).session_id
        for _ in range(3):
            begun, turn_id = await layer.begin(session_id)
            fences.append(begun.fence)
            await layer.sessions.abort(session_id, turn_id)
    assert fences == sorted(set(fences))


async def test_a_second_turn_is_told_how_long_the_lease_lasts(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.begin(session_id)
    busy = await layer.sessions.begin(session_id, "b", ACCESS, with_policy(if_busy="reject"))
    assert isinstance(busy, Busy)
    assert 0 < busy.lease_left_ms <= 15_000
    assert not busy.same_message


@pytest.mark.parametrize("if_busy", ["queue", "reject", "interrupt"])
async def test_the_same_message_is_not_begun_twice_at_once(layer: Layer, if_busy: str) -> None:
    session_id = (await layer.open()).session_id
    await layer.begin(session_id, message_id="m1")
    busy = await layer.sessions.begin(session_id, "b", ACCESS, with_policy(if_busy=if_busy), message_id="m1")
    assert isinstance(busy, Busy)
    assert busy.same_message


async def test_turns_wait_in_the_order_in_which_they_came(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    _, running = await layer.begin(session_id)

    async def ask(turn_id: str) -> Any:
        return await layer.sessions.begin(session_id, turn_id, ACCESS, POLICY)

    assert [await ask(turn_id) for turn_id in "abc"] == [Queued(1), Queued(2), Queued(3)]
    assert await ask("d") == Refused("queue_full")
    assert [await ask(turn_id) for turn_id in "cba"] == [Queued(3), Queued(2), Queued(1)]
    await layer.sessions.abort(session_id, running)
    assert await ask("b") == Queued(2)
    assert await ask("d") == Refused("queue_full")
    rejected = await layer.sessions.begin(session_id, "e", ACCESS, with_policy(if_busy="reject"))
    assert rejected == Busy(0, False, "")
    assert isinstance(await ask("a"), Begun)
    assert [await ask("b"), await ask("c"), await ask("d")] == [Queued(1), Queued(2), Queued(3)]
    await layer.sessions.abort(session_id, "b")
    assert await ask("c") == Queued(1)


async def test_a_waiter_that_does_not_ask_again_loses_its_place(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    _, running = await layer.begin(session_id)
    for turn_id in ("a", "b"):
        await layer.sessions.begin(session_id, turn_id, ACCESS, POLICY)
    waiting = (await layer.fields(session_id))["waiting"].split()
    assert [waiter.split("@")[0] for waiter in waiting] == ["a", "b"]
    now = await layer.redis_ms()
    assert all(now < int(waiter.split("@")[1]) <= now + 2000 for waiter in waiting)

    await layer.set(session_id, waiting=f"a@{now - 1} {waiting[1]}")  # 2 s later

    await layer.sessions.abort(session_id, running)
    assert isinstance(await layer.sessions.begin(session_id, "b", ACCESS, POLICY), Begun)
    assert await layer.sessions.begin(session_id, "a", ACCESS, POLICY) == Queued(1)


async def test_an_interrupting_turn_takes_the_session_over(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    begun, turn_id = await layer.begin(session_id)
    await layer.sessions.begin(session_id, "waiter", ACCESS, POLICY)
    policy = with_policy(if_busy="interrupt")
    busy = await layer.sessions.begin(session_id, "impatient", ACCESS, policy)
    assert busy == Busy(busy.lease_left_ms, False, turn_id) if isinstance(busy, Busy) else None
    assert await TurnLogs(layer.scripts, layer.keys).cancel(session_id, turn_id, ACCESS)
    second, second_id = await layer.begin(session_id, policy=policy)
    assert second.fence > begun.fence
    assert not await layer.sessions.renew(session_id, turn_id, begun.fence)
    assert await layer.commit(begun, new_turn(begun, turn_id)) is None
    assert not await layer.sessions.abort(session_id, turn_id)
    assert await layer.commit(second, new_turn(second, second_id)) is not None
    assert isinstance(await layer.sessions.begin(session_id, "waiter", ACCESS, POLICY), Begun)


async def test_a_turn_whose_lease_ran_out_gives_way(redis_server: RedisServer) -> None:
    async with redis_layer(redis_server.url, lease_ms=1) as layer:
        session_id = (await layer.open()).session_id
        first, first_id = await layer.begin(session_id)
        await _lease_over(layer, session_id)
        second, second_id = await layer.begin(session_id)
        assert second.fence > first.fence
        assert await layer.commit(first, new_turn(first, first_id)) is None
        assert await layer.commit(second, new_turn(second, second_id)) is not None


async def test_an_answered_message_is_given_back(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    turns = [await layer.chat(session_id, f"message {n}", f"m{n}") for n in range(1, 4)]
    for number in (1, 3):
        replay = await layer.sessions.begin(session_id, "again", ACCESS, POLICY, message_id=f"m{number}")
        assert isinstance(replay, Replay)
        assert (replay.number, replay.turn) == (number, turns[number - 1])
    assert (await layer.fields(session_id))["turn"] == ""


async def test_an_answered_message_is_given_back_while_another_runs_and_after_the_end(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.chat(session_id, message_id="m1")
    await layer.begin(session_id)
    assert isinstance(await layer.sessions.begin(session_id, "x", ACCESS, POLICY, message_id="m1"), Replay)
    await layer.sessions.end(session_id, ACCESS)
    assert isinstance(await layer.sessions.begin(session_id, "x", ACCESS, POLICY, message_id="m1"), Replay)
    assert await layer.sessions.begin(session_id, "x", ACCESS, POLICY, message_id="m2") == Refused("ended")


async def test_metadata_that_looks_like_a_message_id_is_not_one(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    begun, turn_id = await layer.begin(session_id)
    turn = new_turn(begun, turn_id, "m1")
    turn.messages[0].metadata = {"message_id": "m2"}
    await layer.commit(begun, turn)
    assert isinstance(await layer.sessions.begin(session_id, "x", ACCESS, POLICY, message_id="m2"), Begun)


async def test_a_full_backlog_refuses_new_turns_but_not_the_commit_of_one_that_runs(redis_server: RedisServer) -> None:
    async with redis_layer(redis_server.url, max_backlog=2) as layer:
        first, second = (await layer.open()).session_id, new_id()
        begun, turn_id = await layer.begin(first)
        await layer.open(second)
        assert await layer.sessions.begin(second, "x", ACCESS, POLICY) == Refused("backlog_full")
        assert await layer.commit(begun, new_turn(begun, turn_id)) is not None
        await layer.flush()
        await layer.begin(second)


async def test_a_session_has_its_own_rate_limit(layer: Layer) -> None:
    session_id, other = (await layer.open()).session_id, (await layer.open()).session_id
    policy = with_policy(rate_messages=3, rate_per_s=600)

    async def ask(session_id: str) -> Any:
        outcome = await layer.sessions.begin(session_id, "a", ACCESS, policy)
        await layer.sessions.abort(session_id, "a")
        return outcome

    assert [isinstance(await ask(session_id), Begun) for _ in range(3)] == [True] * 3
    limited = await ask(session_id)
    assert isinstance(limited, Refused)
    assert limited.reason == "limited"
    assert 190_000 < limited.retry_after_ms <= 200_000
    assert isinstance(await ask(other), Begun)

    tat = int(float((await layer.fields(session_id))["rate_tat_ms"]))
    await layer.set(session_id, rate_tat_ms=tat - limited.retry_after_ms)  # that much later
    assert isinstance(await ask(session_id), Begun)
    assert (await ask(session_id)).reason == "limited"


async def test_a_repeated_begin_is_charged_once(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    policy = with_policy(rate_messages=1, rate_per_s=600)
    first = await layer.sessions.begin(session_id, "a", ACCESS, policy)
    again = await layer.sessions.begin(session_id, "a", ACCESS, policy)
    assert isinstance(first, Begun)
    assert isinstance(again, Begun)
    assert first.fence == again.fence


async def test_a_rate_limit_finer_than_a_millisecond_is_kept_exactly(layer: Layer) -> None:
    """Whatever is charged is rounded: 1500 turns a second take two thirds of a millisecond each."""
    session_id = (await layer.open()).session_id
    start = await layer.redis_ms() + 400_000
    await layer.set(session_id, rate_tat_ms=start)
    for _ in range(30):
        await layer.sessions.begin(session_id, "a", ACCESS, with_policy(rate_messages=900_000, rate_per_s=600))
        await layer.sessions.abort(session_id, "a")
    charged = float((await layer.fields(session_id))["rate_tat_ms"]) - start
    assert charged == pytest.approx(30 * 600_000 / 900_000, abs=1.01)


# ------------------------------------------------------------------------------------------------------------- refusals

Operation = Callable[[SessionStore, str, Access], Awaitable[Any]]
OPERATIONS: dict[str, Operation] = {
    "begin": lambda store, session_id, access: store.begin(session_id, "x", access, POLICY, message_id="m1"),
    "read": lambda store, session_id, access: store.read(session_id, access, 10),
    "end": lambda store, session_id, access: store.end(session_id, access),
    "erase": lambda store, session_id, access: store.erase(session_id, access),
}


@pytest.mark.parametrize("stranger", STRANGERS)
@pytest.mark.parametrize("name", OPERATIONS)
async def test_strangers_are_refused_and_change_nothing(layer: Layer, name: str, stranger: Access) -> None:
    session_id = (await layer.open()).session_id
    await layer.chat(session_id, message_id="m1")
    before = await layer.dump()
    assert await OPERATIONS[name](layer.sessions, session_id, stranger) == Refused("foreign")
    assert await layer.dump() == before


USER, OTHER_USER = Access(AGENT_ID, DOMAIN, user_id="user-1"), Access(AGENT_ID, DOMAIN, user_id="user-2")


@pytest.mark.parametrize("stranger", [ACCESS, OTHER_USER, Access(AGENT_ID, DOMAIN, authorized=True)])
@pytest.mark.parametrize("name", OPERATIONS)
async def test_a_users_session_is_for_that_user_alone(layer: Layer, name: str, stranger: Access) -> None:
    session_id = (await layer.open(user_id="user-1")).session_id
    before = await layer.dump()
    assert await OPERATIONS[name](layer.sessions, session_id, stranger) == Refused("foreign")
    assert await layer.dump() == before
    done = await OPERATIONS[name](layer.sessions, session_id, USER)
    assert not isinstance(done, Refused | Absent)
    await layer.sessions.abort(session_id, "x")


async def test_without_the_comparison_a_users_session_would_be_anybodys(layer: Layer) -> None:
    """Control: the same session, whose user was taken out of the hash."""
    session_id = (await layer.open(user_id="user-1")).session_id
    assert await layer.sessions.read(session_id, OTHER_USER) == Refused("foreign")
    await layer.set(session_id, user_id="")
    assert isinstance(await layer.sessions.read(session_id, OTHER_USER), Hot)


async def test_a_session_becomes_the_users_who_comes_first_and_postgres_is_told_whatever_becomes_of_the_turn(
    layer: Layer,
) -> None:
    session_id = (await layer.open()).session_id
    await layer.chat(session_id)
    await layer.flush()
    for _ in range(2):
        begun = await layer.sessions.begin(session_id, "x", USER, POLICY)
        assert isinstance(begun, Begun)
        assert begun.session.user_id == "user-1"
    assert await layer.sessions.abort(session_id, "x")
    assert not await layer.has_ttl(session_id)
    assert await layer.sessions.begin(session_id, "y", OTHER_USER, POLICY) == Refused("foreign")
    assert [(record.fact, record.session.user_id) for record in await layer.flush()] == [("opened:3", "user-1")]
    assert await layer.has_ttl(session_id)


async def test_opening_a_session_of_nobody_makes_it_the_users_too(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    for _ in range(2):
        found = await layer.sessions.open(new_session(session_id, user_id="user-1"))
        assert isinstance(found, Opened)
        assert (found.created, found.session.user_id) == (False, "user-1")
    for user_id in ("", "user-2"):
        assert await layer.sessions.open(new_session(session_id, user_id=user_id)) == Refused("foreign")
    assert [record.session.user_id for record in await layer.flush()] == ["", "user-1"]


async def test_looking_at_a_session_makes_it_nobodys(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    before = await layer.dump()
    assert isinstance(await layer.sessions.read(session_id, USER), Hot)
    assert await layer.dump() == before


async def test_an_erased_session_is_told_from_none_by_nobody_but_those_who_had_it(layer: Layer) -> None:
    mine, anonymous = (await layer.open(user_id="user-1")).session_id, (await layer.open()).session_id
    for session_id in (mine, anonymous):
        assert isinstance(await layer.sessions.erase(session_id, OPERATOR), str)
        for stranger in (Access(OTHER_AGENT, DOMAIN), Access(AGENT_ID, "other.example")):
            assert await layer.sessions.begin(session_id, "x", stranger, POLICY) == Refused("foreign")
    assert await layer.sessions.begin(mine, "x", OTHER_USER, POLICY) == Refused("foreign")
    assert await layer.sessions.begin(anonymous, "x", ACCESS, POLICY) == Refused("erased")
    assert "user-1" not in str(await layer.dump())


@pytest.mark.parametrize("name", OPERATIONS)
async def test_minted_sessions_need_their_token(layer: Layer, name: str) -> None:
    session_id = (await layer.open(minted=True)).session_id
    before = await layer.dump()
    assert await OPERATIONS[name](layer.sessions, session_id, ACCESS) == Refused("unauthorized")
    assert await layer.dump() == before
    done = await OPERATIONS[name](layer.sessions, session_id, Access(AGENT_ID, DOMAIN, authorized=True))
    assert not isinstance(done, Refused | Absent)
    await layer.sessions.abort(session_id, "x")


@pytest.mark.parametrize("name", OPERATIONS)
async def test_an_erased_session_is_refused(layer: Layer, name: str) -> None:
    session = await layer.open()
    await layer.sessions.erase(session.session_id, ACCESS)
    done = await OPERATIONS[name](layer.sessions, session.session_id, ACCESS)
    assert done == (session.id if name == "erase" else Refused("erased"))
    assert await layer.sessions.open(new_session(session.session_id)) == Refused("erased")


@pytest.mark.parametrize("name", [*OPERATIONS, "time_out"])
async def test_a_session_that_is_not_in_redis_gives_a_ticket(layer: Layer, name: str) -> None:
    session_id = new_id()
    if name == "time_out":
        outcome: Any = await layer.sessions.time_out(session_id, 0)
    else:
        outcome = await OPERATIONS[name](layer.sessions, session_id, ACCESS)
    assert isinstance(outcome, Absent)
    ticket = f"{layer.keys.head(session_id)}ticket:{session_id}"
    assert int(await layer.client.execute_command("GET", ticket)) == outcome.ticket
    assert 0 < await layer.client.pttl(ticket) <= 10_000


# --------------------------------------------------------------------------------------------------------------- commit


async def test_a_commit_changes_session_and_outbox_together(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.flush()
    begun, turn_id = await layer.begin(session_id)
    turn = new_turn(begun, turn_id, "m1")
    committed = await layer.commit(begun, turn, context={"step": 2})
    (record,) = await layer.take()
    hot = await layer.read(session_id)
    assert isinstance(committed, Committed)
    assert committed.message_count == hot.session.message_count == 2
    assert committed.last_activity_at == hot.session.last_activity_at
    assert hot.turns == [turn]
    assert hot.session.context == {"step": 2}
    assert (record.fact, record.session, record.turn) == ("t:1", hot.session, turn)
    fields = await layer.fields(session_id)
    assert fields["unflushed"] == f"t:1@{record.entry}"
    assert {fields[name] for name in ("turn", "turn_fence", "turn_lease_until", "turn_message_id")} == {""}
    assert not await layer.client.execute_command("ZCARD", layer.keys.running(0))
    score = await layer.client.execute_command("ZSCORE", layer.keys.live(0), session_id)
    assert iso(int(float(score))) == committed.last_activity_at


async def test_a_context_stays_unless_a_turn_sets_one(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.chat(session_id, context={"step": 1})
    await layer.chat(session_id)
    assert (await layer.read(session_id)).session.context == {"step": 1}


async def test_only_the_holder_of_the_fence_commits(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    begun, turn_id = await layer.begin(session_id)
    before = await layer.dump()
    turn = new_turn(begun, turn_id)
    assert await layer.commit(msgspec.structs.replace(begun, fence=begun.fence + 1), turn) is None
    assert await layer.commit(begun, new_turn(begun, "other")) is None
    assert (
        await layer.commit(
            msgspec.structs.replace(begun, session=msgspec.structs.replace(begun.session, session_id=new_id())), turn
        )
        is None
    )
    assert await layer.dump() == before


@pytest.mark.parametrize("operation", ["end", "erase"])
async def test_a_turn_does_not_outlive_the_end_of_its_session(layer: Layer, operation: str) -> None:
    session_id = (await layer.open()).session_id
    begun, turn_id = await layer.begin(session_id)
    await OPERATIONS[operation](layer.sessions, session_id, ACCESS)
    before = await layer.dump()
    assert await layer.commit(begun, new_turn(begun, turn_id)) is None
    assert not await layer.sessions.renew(session_id, turn_id, begun.fence)
    assert not await layer.sessions.abort(session_id, turn_id)
    assert await layer.dump() == before


async def test_a_commit_repeated_after_the_next_turn_is_still_known(layer: Layer) -> None:
    """The reply of a commit was lost; before it is repeated, the session has gone on and its turn is flushed."""
    session_id, policy = (await layer.open()).session_id, with_policy(hot_turns=1)
    begun, turn_id = await layer.begin(session_id)
    turn = new_turn(begun, turn_id)
    assert await layer.commit(begun, turn, policy) is not None
    await layer.flush()
    await layer.chat(session_id, policy=policy)
    assert await layer.commit(begun, turn, policy) is not None


async def test_a_message_that_left_the_hot_window_is_not_answered_twice(layer: Layer) -> None:
    """Promise 4: a retry with the same message_id never runs a finished turn again."""
    session_id, policy = (await layer.open()).session_id, with_policy(hot_turns=1)
    await layer.chat(session_id, message_id="m1", policy=policy)
    await layer.flush()
    await layer.chat(session_id, message_id="m2", policy=policy)
    outcome = await layer.sessions.begin(session_id, "again", ACCESS, policy, message_id="m1")
    await layer.sessions.abort(session_id, "again")
    assert not isinstance(outcome, Begun)


# ------------------------------------------------------------------------------------------------ abort, renew, reap, end


async def test_an_aborted_turn_leaves_the_hash_as_it_was(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.chat(session_id)
    await layer.flush()
    before = await layer.dump()
    fence = before.pop(f"{layer.keys.head(session_id)}fence", None)
    _, turn_id = await layer.begin(session_id, message_id="m9")
    assert await layer.sessions.abort(session_id, turn_id)
    after = await layer.dump()
    assert after.pop(f"{layer.keys.head(session_id)}fence") != fence
    assert after == before


async def test_an_aborted_waiter_leaves_the_hash_as_it_was(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.begin(session_id)
    before = await layer.dump()
    await layer.sessions.begin(session_id, "waiter", ACCESS, POLICY)
    assert await layer.dump() != before
    assert await layer.sessions.abort(session_id, "waiter")
    assert not await layer.sessions.abort(session_id, "waiter")
    assert not await layer.sessions.abort(new_id(), "waiter")
    assert await layer.dump() == before


async def test_renewing_moves_the_lease(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    begun, turn_id = await layer.begin(session_id)
    await layer.set(session_id, turn_lease_until=iso(0))
    assert await layer.sessions.renew(session_id, turn_id, begun.fence)
    fields = await layer.fields(session_id)
    now = await layer.redis_ms()
    assert iso(now + 10_000) < fields["turn_lease_until"] <= iso(now + 15_000)
    score = int(float(await layer.client.execute_command("ZSCORE", layer.keys.running(0), session_id)))
    assert iso(score) == fields["turn_lease_until"]
    assert not await layer.sessions.renew(session_id, turn_id, begun.fence + 1)
    assert not await layer.sessions.renew(session_id, "other", begun.fence)
    assert not await layer.sessions.renew(new_id(), turn_id, begun.fence)


async def _lease_over(layer: Layer, session_id: str) -> None:
    async def over() -> bool:
        return iso(await layer.redis_ms()) > (await layer.fields(session_id))["turn_lease_until"]

    await wait_for(over, "the lease runs out")


async def test_the_turn_of_a_dead_pod_is_reaped_and_not_before(redis_server: RedisServer) -> None:
    async with redis_layer(redis_server.url, lease_ms=1) as layer:
        session_id = (await layer.open()).session_id
        begun, turn_id = await layer.begin(session_id)
        await layer.set(session_id, turn_lease_until=iso(await layer.redis_ms() + 60_000))
        assert await layer.sessions.reap(session_id) is None
        await layer.set(session_id, turn_lease_until=iso(await layer.redis_ms()))
        await _lease_over(layer, session_id)
        assert await layer.sessions.reap(session_id) == turn_id
        assert await layer.sessions.reap(session_id) is None
        assert await layer.commit(begun, new_turn(begun, turn_id)) is None
        assert not await layer.client.execute_command("ZCARD", layer.keys.running(0))


async def test_reaping_forgets_what_is_not_there(layer: Layer) -> None:
    session_id = new_id()
    await layer.client.execute_command("ZADD", layer.keys.running(0), 1, session_id)
    assert await layer.sessions.reap(session_id) is None
    assert not await layer.client.execute_command("ZCARD", layer.keys.running(0))


async def test_an_ended_session_stays_ended(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.begin(session_id)
    await layer.sessions.begin(session_id, "waiter", ACCESS, POLICY)
    ended = await layer.sessions.end(session_id, ACCESS)
    assert isinstance(ended, Session)
    assert ended.status == "ended"
    assert ended.ended_at
    assert await layer.sessions.end(session_id, ACCESS) == ended
    assert await layer.sessions.begin(session_id, "waiter", ACCESS, POLICY) == Refused("ended")
    assert await layer.sessions.time_out(session_id, 0) is False
    assert [record.fact for record in await layer.flush()] == ["opened:1", "ended:2"]


async def test_an_idle_session_times_out_and_its_visitor_brings_it_back(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    assert await layer.sessions.time_out(session_id, 60_000) is False
    assert await layer.sessions.time_out(session_id, 0) is True
    assert await layer.sessions.time_out(session_id, 0) is False
    session = (await layer.read(session_id)).session
    assert (session.status, bool(session.ended_at)) == ("timeout", True)
    await layer.chat(session_id)
    session = (await layer.read(session_id)).session
    assert (session.status, session.ended_at) == ("active", "")
    assert [record.fact for record in await layer.flush()] == ["opened:1", "timeout:2", "t:1"]


async def test_a_session_with_a_running_turn_does_not_time_out(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    _, turn_id = await layer.begin(session_id)
    assert await layer.sessions.time_out(session_id, 0) is False
    await layer.sessions.abort(session_id, turn_id)
    assert await layer.sessions.time_out(session_id, 0) is True


# ---------------------------------------------------------------------------------------------------------------- erase


async def test_erasing_leaves_nothing_of_the_visitor(layer: Layer) -> None:
    session_id, other = (await layer.open()).session_id, (await layer.open()).session_id
    await layer.chat(session_id, "flushed secret")
    await layer.flush()
    await layer.chat(session_id, "dead secret")
    (record,) = await layer.take()
    assert await layer.outbox.dead_letter(0, record.entry, session_id, record.fact, "a test")
    await layer.chat(session_id, "taken secret")
    await layer.take()
    await layer.chat(session_id, "new secret")
    await layer.begin(session_id)

    await layer.sessions.erase(session_id, ACCESS)

    assert "secret" not in str(await layer.dump())
    assert not await layer.client.execute_command("ZSCORE", layer.keys.live(0), session_id)
    assert not await layer.client.execute_command("ZCARD", layer.keys.running(0))
    assert not await layer.client.execute_command("XLEN", layer.keys.dead(0))
    pending = (await layer.client.execute_command("XPENDING", layer.keys.outbox(0), GROUP))["pending"]
    records = await layer.flush()
    assert [(record.session.session_id, record.session.status) for record in records] == [(session_id, "erased")]
    assert not pending
    assert not await layer.client.exists(layer.keys.session(session_id))
    assert (await layer.read(other)).session.session_id == other


async def test_records_that_a_worker_still_holds_do_not_bring_an_erased_session_back(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.chat(session_id)
    held = await layer.take()
    await layer.sessions.erase(session_id, ACCESS)
    await layer.outbox.mark_flushed(0, held, 1)
    assert (await layer.fields(session_id))["status"] == "erased"
    assert not await layer.has_ttl(session_id)
    await layer.flush()
    assert not await layer.client.exists(layer.keys.session(session_id))


# -------------------------------------------------------------------------------------------------------------- hydrate


async def snapshot_of(layer: Layer, session_id: str, turns: int = 1000) -> Snapshot:
    """What Postgres would give back of a session whose records are all flushed."""
    hot = await layer.read(session_id, turns)
    return Snapshot(hot.session, hot.first, hot.turns)


async def left_session(layer: Layer, turns: int = 3) -> Snapshot:
    """A session that was flushed and has left Redis."""
    session_id = (await layer.open()).session_id
    for number in range(turns):
        await layer.chat(session_id, f"message {number}", f"m{number}")
    await layer.flush()
    snapshot = await snapshot_of(layer, session_id)
    await layer.evict(session_id)
    return snapshot


async def ticket_for(layer: Layer, session_id: str) -> int:
    absent = await layer.sessions.read(session_id, ACCESS)
    assert isinstance(absent, Absent)
    return absent.ticket


async def test_a_hydrated_session_goes_on_where_it_was(layer: Layer) -> None:
    snapshot = await left_session(layer)
    session_id = snapshot.session.session_id
    assert await layer.sessions.hydrate(snapshot, await ticket_for(layer, session_id), 60)
    hot = await layer.read(session_id)
    assert (hot.session, hot.turns, hot.first_hot, hot.flushed) == (snapshot.session, snapshot.turns, 1, 3)
    assert 59_000 < hot.ttl_ms <= 60_000
    begun, _ = await layer.begin(session_id)
    assert begun.history == messages_of(snapshot.turns)
    replayed = await layer.sessions.begin(session_id, "x", ACCESS, POLICY, message_id="m0")
    assert isinstance(replayed, Replay)


async def test_a_session_is_hydrated_with_its_newest_turns_only(layer: Layer) -> None:
    snapshot = await left_session(layer, 5)
    session_id = snapshot.session.session_id
    part = Snapshot(snapshot.session, 4, snapshot.turns[3:])
    assert await layer.sessions.hydrate(part, await ticket_for(layer, session_id), 60)
    begun, turn_id = await layer.begin(session_id)
    assert begun.history == messages_of(snapshot.turns[3:])
    await layer.commit(begun, new_turn(begun, turn_id))
    hot = await layer.read(session_id)
    assert (hot.first_hot, hot.session.turns, len(hot.turns)) == (4, 6, 3)


async def test_a_hydrated_session_without_turns_is_whole(layer: Layer) -> None:
    snapshot = await left_session(layer, 0)
    assert await layer.sessions.hydrate(snapshot, await ticket_for(layer, snapshot.session.session_id), 60)
    await layer.chat(snapshot.session.session_id)


async def test_a_stalled_process_installs_no_old_session(layer: Layer) -> None:
    old = await left_session(layer)
    session_id = old.session.session_id
    stalled = await ticket_for(layer, session_id)
    assert await layer.sessions.hydrate(old, await ticket_for(layer, session_id), 60)
    assert not await layer.sessions.hydrate(old, stalled, 60), "over the session that is there"
    await layer.chat(session_id)
    await layer.flush()
    await layer.evict(session_id)
    assert not await layer.sessions.hydrate(old, stalled, 60), "after it has left again"
    await ticket_for(layer, session_id)
    assert not await layer.sessions.hydrate(old, stalled, 60), "beside a newer ticket"
    assert not await layer.client.exists(layer.keys.session(session_id))


async def test_without_the_ticket_a_stalled_process_would_install_an_old_session(layer: Layer) -> None:
    """Control: the guard is the ticket and nothing else."""
    old = await left_session(layer)
    session_id = old.session.session_id
    stalled = await ticket_for(layer, session_id)
    ticket_key = f"{layer.keys.head(session_id)}ticket:{session_id}"
    assert await layer.sessions.hydrate(old, stalled, 60)
    await layer.chat(session_id)
    await layer.flush()
    await layer.evict(session_id)
    await layer.client.execute_command("SET", ticket_key, stalled, "PX", 1000)
    assert await layer.sessions.hydrate(old, stalled, 60)
    assert (await layer.read(session_id)).session.turns == 3, "one turn is lost"


# --------------------------------------------------------------------------------------------------------- the one rule


async def test_a_session_has_a_ttl_exactly_when_postgres_has_all_of_it_and_no_turn_runs(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    seen = [await layer.has_ttl(session_id)]
    await layer.flush()
    seen.append(await layer.has_ttl(session_id))
    begun, turn_id = await layer.begin(session_id)
    seen.append(await layer.has_ttl(session_id))
    await layer.sessions.abort(session_id, turn_id)
    seen.append(await layer.has_ttl(session_id))
    begun, turn_id = await layer.begin(session_id)
    await layer.commit(begun, new_turn(begun, turn_id))
    seen.append(await layer.has_ttl(session_id))
    records = await layer.take()
    begun, turn_id = await layer.begin(session_id)
    await layer.outbox.mark_flushed(0, records, 1)
    seen.append(await layer.has_ttl(session_id))
    await layer.sessions.abort(session_id, turn_id)
    seen.append(await layer.has_ttl(session_id))
    await layer.sessions.end(session_id, ACCESS)
    seen.append(await layer.has_ttl(session_id))
    await layer.flush()
    seen.append(await layer.has_ttl(session_id))
    assert seen == [False, True, False, True, False, False, True, False, True]


async def test_the_ttl_is_what_is_left_of_the_idle_time(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.chat(session_id, policy=with_policy(hot_ttl_s=100))
    await layer.set(session_id, last_activity_at=iso(await layer.redis_ms() - 40_000))
    await layer.flush()
    assert 55_000 < await layer.client.pttl(layer.keys.session(session_id)) <= 60_000


async def test_a_session_that_was_idle_for_longer_still_gets_a_moment(layer: Layer) -> None:
    session_id = (await layer.open(hot_ttl_s=1)).session_id
    await layer.set(session_id, last_activity_at=iso(0))
    records = await layer.take()
    await layer.outbox.mark_flushed(0, records, 1)
    ttl = await layer.client.pttl(layer.keys.session(session_id))
    assert 0 < ttl <= 1000


async def test_a_dead_letter_keeps_its_session_in_redis(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.chat(session_id)
    opened, turn = await layer.take()
    await layer.outbox.dead_letter(0, turn.entry, session_id, turn.fact, "a test")
    await layer.outbox.mark_flushed(0, [opened], 1)
    await layer.chat(session_id)
    await layer.flush()
    assert not await layer.has_ttl(session_id)
    assert (await layer.read(session_id)).flushed == 0
    (letter,) = await layer.outbox.dead_letters()
    assert (letter.session_id, letter.fact, letter.reason) == (session_id, "t:1", "a test")

    assert await layer.outbox.retry_dead(letter)
    assert not await layer.outbox.retry_dead(letter)
    (again,) = await layer.flush()

    assert (again.fact, again.turn) == (turn.fact, turn.turn)
    assert await layer.has_ttl(session_id)
    assert (await layer.read(session_id)).flushed == 2
    assert not await layer.outbox.dead_letters()


async def test_the_rule_is_noticed_when_it_is_broken(layer: Layer) -> None:
    """Control of the check that runs after every test here."""
    session_id = (await layer.open()).session_id
    key = layer.keys.session(session_id)
    await layer.client.expire(key, 100)
    assert any(key in wrong for wrong in await breaches(layer.client, layer.keys))
    await layer.flush()
    await layer.client.persist(key)
    assert any(key in wrong for wrong in await breaches(layer.client, layer.keys))
    await layer.client.expire(key, 100)


# ----------------------------------------------------------------------------------------------------------- hot window


async def test_a_turn_leaves_the_hot_window_only_after_postgres_has_it(layer: Layer) -> None:
    session_id, policy = (await layer.open()).session_id, with_policy(hot_turns=2)
    for _ in range(4):
        await layer.chat(session_id, policy=policy)
    assert (await layer.read(session_id)).first_hot == 1, "nothing is flushed: nothing leaves"
    records = await layer.take()
    await layer.outbox.mark_flushed(0, [records[0], records[1], records[3]], 1)  # opened, t:1, t:3
    assert (await layer.read(session_id)).flushed == 1
    await layer.chat(session_id, policy=policy)
    hot = await layer.read(session_id)
    assert (hot.first_hot, len(hot.turns)) == (2, 4), "t:2 is not in Postgres"
    await layer.outbox.mark_flushed(0, records, 1)
    await layer.flush()
    await layer.chat(session_id, policy=policy)
    hot = await layer.read(session_id)
    assert (hot.first_hot, hot.session.turns) == (5, 6)
    names = {name for name in await layer.fields(session_id) if name.startswith("t:")}
    assert names == {"t:5", "t:6"}


async def test_thousands_of_hot_turns_are_served_and_trimmed(layer: Layer) -> None:
    """Lua's stack bounds how many values one call takes: a long outage of Postgres must not reach it."""
    session_id, total = (await layer.open()).session_id, 9000
    template = msgspec.json.encode(await layer.chat(session_id))
    await layer.flush()
    fields: dict[str, Any] = {f"t:{number}": template for number in range(2, total + 1)}
    await layer.set(session_id, turns=total, flushed=total, **fields)
    assert len((await layer.read(session_id, 10**9)).turns) == total
    begun, turn_id = await layer.begin(session_id, message_id="none of them")
    await layer.commit(begun, new_turn(begun, turn_id))
    assert (await layer.read(session_id)).first_hot == total + 1 - 25 + 1


# ---------------------------------------------------------------------------------------------------------- idempotence

Repeated = Callable[[], Awaitable[Any]]


async def _twice_open(layer: Layer) -> Repeated:
    new = new_session(new_id(), minted=True)
    return lambda: layer.sessions.open(new)


async def _twice_begin(layer: Layer) -> Repeated:
    session_id = (await layer.open()).session_id
    await layer.flush()
    policy = with_policy(rate_messages=5)
    return lambda: layer.sessions.begin(session_id, "a", ACCESS, policy, message_id="m")


async def _twice_commit(layer: Layer) -> Repeated:
    session_id = (await layer.open()).session_id
    begun, turn_id = await layer.begin(session_id)
    turn = new_turn(begun, turn_id)
    return lambda: layer.commit(begun, turn, context={"a": 1})


async def _twice_abort(layer: Layer) -> Repeated:
    session_id = (await layer.open()).session_id
    _, turn_id = await layer.begin(session_id)
    await layer.sessions.begin(session_id, "waiter", ACCESS, POLICY)
    return lambda: layer.sessions.abort(session_id, turn_id)


async def _twice_end(layer: Layer) -> Repeated:
    session_id = (await layer.open()).session_id
    return lambda: layer.sessions.end(session_id, ACCESS)


async def _twice_time_out(layer: Layer) -> Repeated:
    session_id = (await layer.open()).session_id
    return lambda: layer.sessions.time_out(session_id, 0)


async def _twice_erase(layer: Layer) -> Repeated:
    session_id = (await layer.open()).session_id
    await layer.chat(session_id)
    return lambda: layer.sessions.erase(session_id, ACCESS)


async def _twice_hydrate(layer: Layer) -> Repeated:
    snapshot = await left_session(layer)
    ticket = await ticket_for(layer, snapshot.session.session_id)
    return lambda: layer.sessions.hydrate(snapshot, ticket, 60)


async def _twice_reap(layer: Layer) -> Repeated:
    session_id = (await layer.open()).session_id
    await layer.begin(session_id)
    await layer.set(session_id, turn_lease_until=iso(0))
    return lambda: layer.sessions.reap(session_id)


async def _twice_mark_flushed(layer: Layer) -> Repeated:
    session_id = (await layer.open()).session_id
    await layer.chat(session_id)
    records = await layer.take()
    return lambda: layer.outbox.mark_flushed(0, records, 1)


async def _twice_dead_letter(layer: Layer) -> Repeated:
    session_id = (await layer.open()).session_id
    (record,) = await layer.take()
    return lambda: layer.outbox.dead_letter(0, record.entry, session_id, record.fact, "a test")


async def _twice_retry_dead(layer: Layer) -> Repeated:
    await (await _twice_dead_letter(layer))()
    letter = (await layer.outbox.dead_letters())[-1]
    return lambda: layer.outbox.retry_dead(letter)


async def _twice_trim(layer: Layer) -> Repeated:
    session_id = (await left_session(layer)).session.session_id
    names = [layer.keys.live(0), layer.keys.session(session_id)]
    return lambda: layer.scripts.run("trim", "", names, {"session_ids": session_id})


async def _twice_trim_logs(layer: Layer) -> Repeated:
    session_id = new_id()
    await layer.client.hset(layer.keys.logs(0), session_id, f"{new_id()}@{await layer.redis_ms() - 1}")
    return lambda: layer.scripts.run("trim_logs", "", [layer.keys.logs(0)], {"session_ids": session_id})


async def _twice_renew(layer: Layer) -> Repeated:
    session_id = (await layer.open()).session_id
    begun, turn_id = await layer.begin(session_id)
    return lambda: layer.sessions.renew(session_id, turn_id, begun.fence)


async def _twice_append(layer: Layer) -> Repeated:
    session_id = (await layer.open()).session_id
    begun, turn_id = await layer.begin(session_id)
    part = Part(0, [LoggedEvent(1, "turn.started", b"{}"), LoggedEvent(2, "text.delta", b'{"text":"a"}')])
    return lambda: TurnLogs(layer.scripts, layer.keys).append(session_id, turn_id, begun.fence, part)


async def _twice_cancel(layer: Layer) -> Repeated:
    session_id = (await layer.open()).session_id
    _, turn_id = await layer.begin(session_id)
    return lambda: TurnLogs(layer.scripts, layer.keys).cancel(session_id, turn_id, ACCESS)


async def _twice_settle(layer: Layer) -> Repeated:
    await layer.open()
    keys = [layer.keys.epoch(0), layer.keys.fence(0)]
    arguments: dict[str, Argument] = {"server": "another", "after": 3, "redo": 0, "fence": 9, "seen": 12, "jump": 100}
    return lambda: layer.scripts.run("settle", "", keys, arguments)


async def _twice_forget_logs(layer: Layer) -> Repeated:
    session_id, turn_id = new_id(), str(uuid7())
    await layer.client.hset(layer.keys.logs(0), session_id, f"{turn_id}@{await layer.redis_ms() + 60_000}")
    await layer.client.xadd(layer.keys.events(session_id, turn_id), {"session": session_id})
    return lambda: layer.sessions.forget_logs(session_id)


async def _twice_doubt(layer: Layer) -> Repeated:
    session_id = (await layer.open()).session_id
    return lambda: layer.sessions.doubt(session_id)


async def _twice_reconcile(layer: Layer) -> Repeated:
    session = await layer.open()
    await layer.sessions.doubt(session.session_id)
    ticket = await ticket_for(layer, session.session_id)
    return lambda: layer.sessions.reconcile(session.session_id, ticket, None)


REPEATED: dict[str, Callable[[Layer], Awaitable[Repeated]]] = {
    name.removeprefix("_twice_"): prepare for name, prepare in globals().copy().items() if name.startswith("_twice_")
}
NOT_REPEATED = {"try_write", "read", "follow", "take", "limit", "command", "leave"}
"""Reads; the charge of an address, which a lost reply may double: it holds no visitor's words; and what only sets."""


def test_every_write_script_is_among_those_repeated_here() -> None:
    assert set(REPEATED) | NOT_REPEATED == set(link_scripts())


@pytest.mark.parametrize("name", REPEATED)
async def test_repeating_a_script_with_the_same_ids_changes_nothing(layer: Layer, name: str) -> None:
    operation = await REPEATED[name](layer)
    before = await layer.dump()
    await operation()
    once = await layer.dump()
    assert name == "renew" or once != before, "the first call did something"
    await operation()
    twice = await layer.dump()
    if name == "renew":
        for found in (once, twice):
            for key in (key for key in found if ":session:" in key):
                del found[key][0][b"turn_lease_until"]
            del found[layer.keys.running(0)]
    assert twice == once


# ---------------------------------------------------------------------------------------------------- limits and agents


async def test_a_bucket_is_charged_and_forgotten_when_it_is_empty(layer: Layer) -> None:
    limits = SharedLimits(layer.scripts, layer.keys)

    async def ahead_ms(bucket: str, cost: int, interval_ms: float) -> int:
        learned, error = await limits.sync({bucket: RateUpdate(cost, interval_ms)})
        assert error is None
        return learned[bucket].value

    assert await ahead_ms("address", 3, 100) == 300
    assert 300 < await ahead_ms("address", 2, 100.5) <= 501
    assert await ahead_ms("another", 1, 100) == 100
    # What is given back is not charged, and no bucket has more room than it has.
    assert 200 < await ahead_ms("address", -2, 100) <= 301
    assert await ahead_ms("another", -5, 100) == 0
    assert not await layer.client.exists(layer.keys.limit("another"))
    assert 0 < await layer.client.pttl(layer.keys.limit("address")) <= 303
    # A bucket whose time has passed may still be there; it is as good as empty.
    await layer.client.execute_command("SET", layer.keys.limit("old"), await layer.redis_ms() - 5000, "PX", 5000)
    assert await ahead_ms("old", 1, 100) == 100
    for bucket in ("address", "old"):
        await layer.client.delete(layer.keys.limit(bucket))


AGENT = Agent(AGENT_ID, "shop", AgentDefinition(graph="echo", config={"model": "näme"}))


async def test_an_agent_is_found_by_id_and_by_name(layer: Layer) -> None:
    copies = AgentCopies(layer.scripts, layer.keys)
    assert await copies.find("shop") is None
    assert await copies.find(AGENT_ID) is None
    await copies.put(AGENT)
    assert await copies.find("shop") == await copies.find(AGENT_ID) == await copies.find(AGENT_ID.upper()) == AGENT
    await copies.put(Agent(AGENT_ID, "store", AGENT.definition), "shop")
    assert await copies.find("shop") is None
    found = await copies.find("store")
    assert found is not None
    await copies.delete(found)
    assert await copies.find("store") is None
    assert await copies.find(AGENT_ID) is None


@pytest.mark.parametrize("field", ["id", "name", "definition"])
@pytest.mark.parametrize("value", [None, b"\xff\xfe garbage"])
async def test_a_damaged_copy_of_an_agent_is_not_taken_for_absence(layer: Layer, field: str, value: bytes | None) -> None:
    copies = AgentCopies(layer.scripts, layer.keys)
    await copies.put(AGENT)
    key = layer.keys.agent(AGENT_ID)
    if value is None:
        await layer.client.execute_command("HDEL", key, field)
    else:
        await layer.client.execute_command("HSET", key, field, value)
    with pytest.raises(Damaged, match=field):
        await copies.find(AGENT_ID)


async def test_a_damaged_pointer_to_an_agent_is_not_taken_for_absence(layer: Layer) -> None:
    copies = AgentCopies(layer.scripts, layer.keys)
    await copies.put(AGENT)
    await layer.client.execute_command("DEL", layer.keys.agent("shop"))
    await layer.client.execute_command("HSET", layer.keys.agent("shop"), "other", "x")
    with pytest.raises(Damaged):
        await copies.find("shop")


# ----------------------------------------------------------------------------------------------------- what is written


class RecordingScripts(Scripts):
    """Remembers the keys that were declared through KEYS."""

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        self.declared: set[str] = set()

    async def run(
        self,
        name: str,
        session_id: str,
        keys: Sequence[str],
        arguments: Mapping[str, Argument],
        timeout_s: float = 1.8,
        *,
        rest: Sequence[Argument] = (),
        durable: bool = False,
    ) -> list[Any]:
        self.declared.update(keys)
        return await super().run(name, session_id, keys, arguments, timeout_s, rest=rest)


def key_table() -> list[tuple[str, str, str]]:
    """The table of keys.py: pattern, type, life."""
    rows = []
    for line in (keys.__doc__ or "").splitlines():
        if match := re.match(r"(gw:\S+) +(\w+) +(\S+)", line):
            pattern = re.sub(r"<[^>]+>", "*", match[1]).replace("{p}", "{[]0-9]*}").replace("[]0-9]", "[0-9]")
            rows.append((pattern, match[2], match[3]))
    return rows


async def test_every_key_is_declared_and_in_the_table_with_its_type_and_life(layer: Layer) -> None:
    scripts = RecordingScripts(layer.client)
    recording = Layer(layer.client, layer.keys, scripts)
    for prepare in REPEATED.values():
        operation = await prepare(recording)
        await operation()
        await recording.flush()
    limits: dict[str, LimitUpdate] = {
        "bucket": RateUpdate(1, 1000),
        "day:an-agent": DayUpdate(1),
        "running:an-agent": RunningUpdate("a-pod", 1, 5000),
    }
    await SharedLimits(scripts, layer.keys).sync(limits)
    await Probe(scripts, layer.keys).check()
    # A plain command behind a script, for which no replica is here.
    scripts.declared.add(f"{layer.keys.head('')}awaited")
    await layer.client.set(f"{layer.keys.head('')}awaited", "", px=60_000)
    await AgentCopies(layer.scripts, layer.keys).put(AGENT)
    await recording.sessions.read(new_id(), ACCESS)
    with pytest.raises(NotReplicated):
        await Scripts(layer.client, replicas=1).confirm(layer.keys.outbox(0))
    table = key_table()
    assert len(table) == 19
    seen: set[str] = set()
    for key in await all_keys(layer.client, layer.keys):
        rows = [row for row in table if fnmatchcase(key, row[0])]
        assert rows, f"{key} is not in the table of keys.py"
        kind = (await layer.client.execute_command("TYPE", key)).decode()
        assert kind in {row[1] for row in rows}, key
        permanent = await layer.client.execute_command("PTTL", key) == -1
        assert permanent or {row[2].rstrip(",") for row in rows} != {"permanent"}, f"{key} has a TTL"
        seen.update(row[0] for row in rows)
        if not key.startswith(("gw:agent:", "gw:meta")) and not key.endswith(":awaited"):
            assert key in scripts.declared, f"{key} was written, and not declared"
    assert seen == {row[0] for row in table}, "this test did not write every key of the table"
    for limit in limits:
        await layer.client.delete(layer.keys.limit(limit))


def test_no_script_touches_a_key_that_it_did_not_bind_first() -> None:
    """KEYS and ARGV are bound at the top, and no name of a key is made up in Lua."""
    for name, (text, _) in link_scripts().items():
        own = (LUA / f"{name}.lua").read_text()
        assert own.startswith("#!lua"), name
        assert "gw:" not in text, name
        bound = [number for number, line in enumerate(own.splitlines()) if "KEYS[" in line and not line.startswith("--")]
        called = [number for number, line in enumerate(own.splitlines()) if "redis.call" in line]
        assert bound, name
        assert not called or max(bound) < min(called), name
        for key in re.findall(r"redis\.call\('(?!TIME|XREADGROUP|XGROUP|PUBLISH)\w+', ([^,)]+)", text):
            assert re.fullmatch(r"key|outbox_key|\w+_key|(session|events)_keys\[index\]", key.strip()), f"{name}: {key}"


async def test_a_new_session_has_every_field_of_the_list_and_no_other(layer: Layer) -> None:
    names = {"format", *(field.name for field in SESSION_FIELDS)}
    session_id = (await layer.open()).session_id
    assert set(await layer.fields(session_id)) == names
    await layer.flush()
    snapshot = await snapshot_of(layer, session_id)
    await layer.evict(session_id)
    await layer.sessions.hydrate(snapshot, await ticket_for(layer, session_id), 60)
    assert set(await layer.fields(session_id)) == names
    await layer.sessions.erase(session_id, ACCESS)
    assert set(await layer.fields(session_id)) == names


# ------------------------------------------------------------------------------------------------------------ timestamps


async def in_lua(client: Client, body: str, arguments: Sequence[str | int]) -> list[bytes]:
    """Runs a script of the library's functions for timestamps."""
    text = "\n".join(["#!lua", *((LUA / "lib" / f"{name}.lua").read_text() for name in ("iso", "from_iso")), body])
    reply: list[bytes] = await client.execute_command("EVAL", text, 0, *arguments)
    return reply


def _moments() -> list[int]:
    day = 86_400_000
    days = [*range(0, 2_932_896, 997)]  # 1970 to 9999
    for year in (1972, 1999, 2000, 2023, 2024, 2025, 2026, 2096, 2099, 2100, 2104, 2400, 9996):
        first = (datetime(year, 1, 1, tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(days=1)
        days += [first, first + 58, first + 59, first + 60, first + 364, first + 365]
    times = [0, 1, 999, 1000, 59_999, 3_599_999, 43_200_005, day - 1]
    return [number * day + times[index % len(times)] for index, number in enumerate(days)] + [
        1_772_323_200_000 + offset for offset in range(-50, 50)
    ]


async def test_lua_writes_and_reads_timestamps_as_python_does(layer: Layer) -> None:
    moments = _moments()
    assert len(moments) > 3000
    body = "local t = {} for i, ms in ipairs(ARGV) do t[i] = iso(tonumber(ms)) end return t"
    written = [text.decode() for text in await in_lua(layer.client, body, moments)]
    assert written == [iso(ms) for ms in moments]
    body = "local t = {} for i, text in ipairs(ARGV) do t[i] = string.format('%d', from_iso(text)) end return t"
    assert [int(ms) for ms in await in_lua(layer.client, body, written)] == moments


@pytest.mark.parametrize(
    "text",
    ["", "x", "2026-01-01", "2026-01-01T00:00:00Z", "2026-01-01T00:00:00.000", "2026-13-01T00:00:00.000Z",
     "2026-01-32T00:00:00.000Z", "2026-01-01T24:00:00.000Z", "2026-01-01T00:60:00.000Z", "2026-00-00T00:00:00.000Z"],
)  # fmt: skip
async def test_lua_reads_no_timestamp_that_is_none(layer: Layer, text: str) -> None:
    reply = await in_lua(layer.client, "return {from_iso(ARGV[1]) == nil and 'none' or 'read'}", [text])
    assert reply == [b"none"]


async def test_a_key_of_another_type_is_an_error_and_not_an_absent_session(layer: Layer) -> None:
    session_id = new_id()
    await layer.client.execute_command("SET", layer.keys.session(session_id), "not a hash", "PX", 60_000)
    with pytest.raises(CommandRefused):
        await layer.sessions.begin(session_id, "a", ACCESS, POLICY)
    with pytest.raises(CommandRefused):
        await layer.sessions.read(session_id, OPERATOR)
    await layer.client.delete(layer.keys.session(session_id))


async def test_reading_changes_nothing(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.chat(session_id)
    before = await layer.dump()
    hot = await layer.sessions.read(session_id, ACCESS, 1)
    assert isinstance(hot, Hot)
    assert (hot.ttl_ms, hot.first, len(hot.turns)) == (-1, 1, 1)
    assert await layer.dump() == before


async def test_a_turn_id_is_used_once(layer: Layer) -> None:
    """A begin that was delayed on its way must not run a turn again that is committed."""
    session_id = (await layer.open()).session_id
    begun, turn_id = await layer.begin(session_id)
    await layer.commit(begun, new_turn(begun, turn_id))
    assert (await layer.read(session_id)).turns[0].id == turn_id
    other, _ = await layer.begin(session_id, str(uuid7()))
    assert other.fence > begun.fence


# ---------------------------------------------------------------------------------------------------- a clock set back


async def test_a_lease_and_a_limit_in_the_future_are_shortened(layer: Layer) -> None:
    """The clock of Redis was set back by ten minutes: nobody waits for it to catch up."""
    policy = TurnPolicy(hot_turns=5, hot_ttl_s=60, rate_messages=2, rate_per_s=10, if_busy="reject")
    session_id = (await layer.open()).session_id
    await layer.begin(session_id, policy=policy)
    later = await layer.redis_ms() + 600_000
    await layer.set(session_id, turn_lease_until=iso(later), rate_tat_ms=later)
    busy = await layer.sessions.begin(session_id, "another", ACCESS, policy)
    assert isinstance(busy, Busy)
    assert busy.lease_left_ms <= layer.sessions.lease_ms
    left_ms = ms_of((await layer.fields(session_id))["turn_lease_until"]) - await layer.redis_ms()
    assert left_ms <= layer.sessions.lease_ms
    await layer.set(session_id, turn_lease_until=iso(0))
    assert isinstance(await layer.sessions.begin(session_id, "another", ACCESS, policy), Begun)


async def test_a_shared_limit_in_the_future_is_shortened(layer: Layer) -> None:
    limits = SharedLimits(layer.scripts, layer.keys)
    later = await layer.redis_ms() + 600_000
    await layer.client.execute_command("SET", layer.keys.limit("bucket"), later, "PX", 600_000)
    learned, _ = await limits.sync({"bucket": RateUpdate(1, 1000, 20_000)})
    assert learned["bucket"].value == 1_000
