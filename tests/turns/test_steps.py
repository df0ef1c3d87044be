"""The steps of a turn where something comes between them: a cancel, a lost reply, a Redis that is away.

And what its admission is charged for at each end.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from gateway.app import Pod, Stores
from gateway.graphs.contract import Emit, GraphInput, GraphOutput
from gateway.limits.admission import Outcome, Unlimited
from gateway.problems import (
    ChannelNotAllowed,
    Draining,
    GraphFailed,
    MessageIdReused,
    Problem,
    RateLimited,
    RedisDown,
    SessionEnded,
    SessionNotFound,
    TurnCancelled,
    TurnInProgress,
    TurnSuperseded,
    TurnTimeout,
)
from gateway.streams.log import TurnLog
from gateway.turns.request import Attached, TurnRequest
from gateway.turns.turns import Turns
from persistence.errors import RedisUnavailable
from persistence.model.agents import Agent
from persistence.model.session import Access
from persistence.redis.outcomes import Absent, Begun
from persistence.redis.sessions import SessionStore
from tests.conftest import PutAgent
from tests.support.pods import fields_of
from tests.support.serving import wait_for
from tests.turns.conftest import SESSION_ID, waiting

RunGraph = Callable[[Agent, GraphInput, Emit | None], Awaitable[GraphOutput]]
ANYBODY = Access()


class Recorded(Unlimited):
    """An admission that records how its turn was closed. Without a `place` or a `session` to give it refuses the turn."""

    def __init__(self, *, place: bool = True, session: bool = True) -> None:
        self.closed: list[Outcome] = []
        self._place = place
        self._session = session

    async def hold(self) -> None:
        if not self._place:
            raise RateLimited("no place")

    def reserve_session(self) -> None:
        if not self._session:
            raise RateLimited("no session")

    def close(self, outcome: Outcome) -> None:
        self.closed.append(outcome)


class Graph:
    """A graph that answers when it may, whether it is cancelled or not if it is `stubborn`."""

    def __init__(self, *, stubborn: bool = False, error: Exception | None = None) -> None:
        self.may_answer = asyncio.Event()
        self.started = asyncio.Event()
        self.cancelled = asyncio.Event()
        self._stubborn = stubborn
        self._error = error

    async def run(self, agent: Agent, graph_input: GraphInput, emit: Emit | None) -> GraphOutput:
        self.started.set()
        while not self.may_answer.is_set():
            try:
                await self.may_answer.wait()
            except asyncio.CancelledError:
                self.cancelled.set()
                if not self._stubborn:
                    raise
        if self._error is not None:
            raise self._error
        return GraphOutput(f"Answer to {graph_input.user_input}", None, {})


@pytest.fixture
async def agent(put_agent: PutAgent) -> Agent:
    return await put_agent(channels=("text",))


@pytest.fixture
def turns_on(pod: Pod) -> Callable[..., Turns]:
    """Turns that run a graph of the test's: `turns_on(graph)`, on a session store of its own if need be."""

    def make(graph: Graph, store: SessionStore | None = None, **options: Any) -> Turns:
        stores = pod.stores
        return Turns(
            store or stores.sessions, stores.turn_logs, pod.streams, stores.hydrator, graph.run, pod.metrics, **options
        )

    return make


def answering() -> Graph:
    graph = Graph()
    graph.may_answer.set()
    return graph


def asked(message: str = "Hello", **fields: Any) -> TurnRequest:
    return TurnRequest(session_id=SESSION_ID, message=message, **{"access": ANYBODY, **fields})


async def running_in(stores: Stores) -> str:
    """The id of the turn that holds the session, '' for none."""
    return (await fields_of(stores, SESSION_ID)).get("turn", "")


# -------------------------------------------------------------------------------------------------------------- cancelled


@pytest.mark.parametrize("anew", [False, True], ids=["once", "begun anew"])
async def test_a_turn_that_is_cancelled_before_its_begin_is_answered_runs_no_graph_and_holds_nothing(
    turns_on: Callable[..., Turns], stores: Stores, agent: Agent, monkeypatch: pytest.MonkeyPatch, anew: bool
) -> None:
    """`begin` takes a session anew that has been taken from its turn before it was read."""
    graph = answering()
    turns = turns_on(graph)
    begin = stores.sessions.begin

    async def slowly(session_id: str, turn_id: str, *arguments: Any, **named: Any) -> Any:
        found = await begin(session_id, turn_id, *arguments, **named)
        if isinstance(found, Begun):
            assert await stores.turn_logs.cancel(session_id, turn_id, ANYBODY) is True
            turns.cancel(turn_id)
            if anew:
                found = await begin(session_id, turn_id, *arguments, **named)
        return found

    monkeypatch.setattr(stores.sessions, "begin", slowly)
    admission = Recorded()
    with pytest.raises(TurnCancelled):
        await turns.execute(agent, asked(), admission)
    assert admission.closed == ["ran"]
    assert await running_in(stores) == ""

    turn_log = await turns.stream(agent, asked())
    assert isinstance(turn_log, TurnLog)
    await wait_for(lambda: turn_log.done, "the log ends")
    assert [event.kind for event in turn_log.events] == ["turn.started", "turn.cancelled"]
    assert not graph.started.is_set()
    assert await running_in(stores) == ""


async def test_a_cancelled_turn_is_cancelled_even_if_its_graph_answers(
    turns_on: Callable[..., Turns], stores: Stores, agent: Agent
) -> None:
    graph, admission = Graph(stubborn=True), Recorded()
    turns = turns_on(graph)
    running = asyncio.create_task(turns.execute(agent, asked(), admission))
    await graph.started.wait()
    turn_id = await running_in(stores)
    assert await stores.turn_logs.cancel(SESSION_ID, turn_id, ANYBODY) is True
    turns.cancel(turn_id)
    await graph.cancelled.wait()
    graph.may_answer.set()
    with pytest.raises(TurnCancelled):
        await running
    assert admission.closed == ["ran"]
    assert (await fields_of(stores, SESSION_ID))["turns"] == "0"


async def test_a_turn_that_is_cancelled_while_it_commits_is_cancelled(
    turns_on: Callable[..., Turns], stores: Stores, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    turns = turns_on(answering())
    commit = stores.sessions.commit

    async def late(begun: Begun, turn: Any, *arguments: Any) -> Any:
        assert await stores.turn_logs.cancel(SESSION_ID, turn.id, ANYBODY) is True
        turns.cancel(turn.id)
        return await commit(begun, turn, *arguments)

    monkeypatch.setattr(stores.sessions, "commit", late)
    with pytest.raises(TurnCancelled):
        await turns.execute(agent, asked())
    assert (await fields_of(stores, SESSION_ID))["turns"] == "0"


async def test_cancelling_a_turn_that_runs_elsewhere_or_has_ended_does_nothing(
    turns_on: Callable[..., Turns], agent: Agent
) -> None:
    turns = turns_on(answering())
    turns.cancel("01980000-0000-7000-8000-000000000000")
    result = await turns.execute(agent, asked())
    turns.cancel(result.metadata["turn_id"])
    assert result.response == "Answer to Hello"


# -------------------------------------------------------------------------------------------------------- lost, or retried


async def test_a_turn_that_loses_its_lease_ends_its_graph(
    turns_on: Callable[..., Turns], stores: Stores, agent: Agent
) -> None:
    graph, admission = Graph(), Recorded()
    store = SessionStore(stores.scripts, stores.keys, lease_ms=300)
    running = asyncio.create_task(turns_on(graph, store).execute(agent, asked(), admission))
    await graph.started.wait()
    await store.abort(SESSION_ID, await running_in(stores))
    with pytest.raises(TurnSuperseded):
        await running
    assert graph.cancelled.is_set()
    assert admission.closed == ["ran"]


async def test_a_graph_that_answers_after_its_lease_was_lost_commits_nothing(
    turns_on: Callable[..., Turns], stores: Stores, agent: Agent
) -> None:
    graph = Graph(stubborn=True)
    store = SessionStore(stores.scripts, stores.keys, lease_ms=300)
    running = asyncio.create_task(turns_on(graph, store).execute(agent, asked()))
    await graph.started.wait()
    await store.abort(SESSION_ID, await running_in(stores))
    await graph.cancelled.wait()
    graph.may_answer.set()
    with pytest.raises(TurnSuperseded):
        await running
    assert (await fields_of(stores, SESSION_ID))["turns"] == "0"


async def test_a_commit_whose_replies_are_lost_is_sent_again_and_adds_the_turn_once(
    turns_on: Callable[..., Turns], stores: Stores, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, calls = stores.sessions.commit, 0

    async def unheard(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        committed = await commit(*arguments)
        if calls < 3:
            raise RedisUnavailable("the reply was lost")
        return committed

    monkeypatch.setattr(stores.sessions, "commit", unheard)
    admission = Recorded()
    result = await turns_on(answering()).execute(agent, asked(), admission)
    assert (result.response, calls, admission.closed) == ("Answer to Hello", 3, ["ran"])
    assert (await fields_of(stores, SESSION_ID))["turns"] == "1"


async def test_a_commit_is_given_up_when_the_lease_may_be_over(
    turns_on: Callable[..., Turns], stores: Stores, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    async def away(*_: Any) -> None:
        nonlocal calls
        calls += 1
        raise RedisUnavailable("Redis is away")

    store = SessionStore(stores.scripts, stores.keys, lease_ms=1000)
    monkeypatch.setattr(store, "commit", away)
    with pytest.raises(RedisDown):
        await turns_on(answering(), store).execute(agent, asked())
    assert 1 < calls <= 5
    assert await running_in(stores) == ""


async def test_an_abort_that_fails_goes_on_without_the_visitor_until_the_session_is_free(
    turns_on: Callable[..., Turns], stores: Stores, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    abort, back, calls = stores.sessions.abort, asyncio.Event(), 0

    async def away(*arguments: Any) -> bool:
        nonlocal calls
        calls += 1
        if calls == 1:
            await back.wait()
            raise RedisUnavailable("Redis is away")
        return await abort(*arguments)

    monkeypatch.setattr(stores.sessions, "abort", away)
    graph = Graph(error=GraphFailed())
    graph.may_answer.set()
    turns = turns_on(graph)
    with pytest.raises(GraphFailed):
        # Redis is not back before the visitor is answered: a wait for it would never end.
        await turns.execute(agent, asked())
    assert await running_in(stores) != ""
    back.set()

    async def is_free() -> bool:
        return await running_in(stores) == ""

    await wait_for(is_free, "the session is free")
    assert calls == 2


async def test_a_pod_that_drains_tries_no_abort_again(
    turns_on: Callable[..., Turns], stores: Stores, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    async def away(*_: Any) -> bool:
        nonlocal calls
        calls += 1
        raise RedisUnavailable("Redis is away")

    graph = Graph()
    turns = turns_on(graph)
    running = asyncio.create_task(turns.execute(agent, asked()))
    await graph.started.wait()
    monkeypatch.setattr(stores.sessions, "abort", away)
    await turns.drain(0)
    with pytest.raises(Draining):
        await running
    assert calls == 1


async def test_a_session_that_leaves_redis_again_and_again_is_refused_for_now(
    turns_on: Callable[..., Turns], stores: Stores, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin = stores.sessions.begin

    async def evicted(*arguments: Any, **named: Any) -> Any:
        await stores.client.delete(stores.keys.session(SESSION_ID))
        return await begin(*arguments, **named)

    monkeypatch.setattr(stores.sessions, "begin", evicted)
    admission = Recorded()
    with pytest.raises(RedisDown) as raised:
        await turns_on(answering()).execute(agent, asked(), admission)
    assert raised.value.retry_after_s == 1
    assert admission.closed == ["refused"]


# --------------------------------------------------------------------------------------------------- what a turn costs


@pytest.mark.parametrize(
    ("admission", "request_", "problem"),
    [
        (Recorded(place=False), asked(), RateLimited),
        (Recorded(session=False), asked(), RateLimited),
        (Recorded(), asked(channel="phone"), ChannelNotAllowed),
        (Recorded(), asked(access=Access(authorized=True)), SessionNotFound),
    ],
    ids=["no place", "no session", "the channel", "an erased session"],
)
async def test_a_turn_that_is_refused_costs_nothing_and_asks_redis_for_no_abort(
    turns_on: Callable[..., Turns],
    stores: Stores,
    agent: Agent,
    monkeypatch: pytest.MonkeyPatch,
    admission: Recorded,
    request_: TurnRequest,
    problem: type[Problem],
) -> None:
    async def never(*_: Any) -> bool:
        raise AssertionError("there is nothing to give up")

    monkeypatch.setattr(stores.sessions, "abort", never)
    with pytest.raises(problem):
        await turns_on(answering()).execute(agent, request_, admission)
    assert admission.closed == ["refused"]


async def test_an_ended_session_and_a_reused_message_id_cost_nothing(
    turns_on: Callable[..., Turns], stores: Stores, agent: Agent
) -> None:
    turns = turns_on(answering())
    await turns.execute(agent, asked(message_id="m1"))
    reused, ended = Recorded(), Recorded()
    with pytest.raises(MessageIdReused):
        await turns.execute(agent, asked("Goodbye", message_id="m1"), reused)
    assert not isinstance(await stores.sessions.end(SESSION_ID, ANYBODY), Absent)
    with pytest.raises(SessionEnded):
        await turns.execute(agent, asked(), ended)
    assert (reused.closed, ended.closed) == (["refused"], ["refused"])


async def test_an_answer_that_is_given_again_and_a_turn_that_is_followed_are_repeated(
    turns_on: Callable[..., Turns], stores: Stores, agent: Agent
) -> None:
    graph = Graph()
    turns = turns_on(graph)
    first = asyncio.create_task(turns.execute(agent, asked(message_id="m1")))
    await graph.started.wait()
    followed, again = Recorded(), Recorded()
    assert await turns.stream(agent, asked(message_id="m1"), followed) == Attached(await running_in(stores))
    await wait_for(lambda: followed.closed == ["repeated"], "the turn is closed")
    graph.may_answer.set()
    result = await first
    replayed = await turns.execute(agent, asked(message_id="m1"), again)
    assert replayed.metadata == result.metadata | {"replayed": True}
    assert again.closed == ["repeated"]


async def test_a_turn_that_failed_has_run(turns_on: Callable[..., Turns], put_agent: PutAgent) -> None:
    agent = await put_agent(turn_timeout_s=0.1)
    admission = Recorded()
    with pytest.raises(TurnTimeout):
        await turns_on(Graph()).execute(agent, asked(), admission)
    assert admission.closed == ["ran"]


async def test_a_turn_that_waited_in_vain_costs_nothing_and_leaves_its_place(
    turns_on: Callable[..., Turns], stores: Stores, agent: Agent
) -> None:
    graph, admission = Graph(), Recorded()
    first = asyncio.create_task(turns_on(graph).execute(agent, asked("One")))
    await graph.started.wait()
    with pytest.raises(TurnInProgress):
        await turns_on(graph, queue_wait_s=0.1).execute(agent, asked("Two"), admission)
    await waiting(stores, 0)
    assert admission.closed == ["refused"]
    graph.may_answer.set()
    await first


async def test_a_turn_whose_pod_drains_while_it_waits_costs_nothing_and_leaves_its_place(
    turns_on: Callable[..., Turns], stores: Stores, agent: Agent
) -> None:
    graph, admission = Graph(), Recorded()
    first = asyncio.create_task(turns_on(graph).execute(agent, asked("One")))
    await graph.started.wait()
    turns = turns_on(graph)
    second = asyncio.create_task(turns.execute(agent, asked("Two"), admission))
    await waiting(stores, 1)
    await turns.drain(0)
    with pytest.raises(Draining):
        await second
    await waiting(stores, 0)
    assert admission.closed == ["refused"]
    late = Recorded()
    with pytest.raises(Draining):
        await turns.execute(agent, asked("Three"), late)
    assert late.closed == ["refused"]
    graph.may_answer.set()
    await first
