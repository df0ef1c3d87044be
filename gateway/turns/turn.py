"""One turn and its steps: begin, run the graph under the lease, commit, or give up. Its states are in states.py.

A turn belongs to the application, not to the request that asked for it: a visitor who closes the tab ends no turn.
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from functools import partial
from hashlib import sha256
from time import monotonic
from typing import Any, Protocol, TypeVar

import msgspec
import structlog
from uuid_utils import uuid7

from gateway.graphs.contract import GraphInput, GraphOutput, RunGraph
from gateway.limits.admission import Admission, Unlimited
from gateway.problems import (
    ChannelNotAllowed,
    GraphFailed,
    MessageIdReused,
    Problem,
    SessionNotFound,
    TurnCancelled,
    TurnInProgress,
    TurnSuperseded,
    TurnTimeout,
)
from gateway.streams import events
from gateway.streams.events import answer_metadata
from gateway.turns.aborts import Aborts
from gateway.turns.content import graph_input, stored_turn
from gateway.turns.lease import Lease
from gateway.turns.refusals import raise_refusal
from gateway.turns.request import Attached, TurnRequest, TurnResult
from gateway.turns.states import CANCELLED, CANCELLED_EARLY, LOST, NEW, Trigger, next_state
from gateway.turns.streamed import StreamedTurn
from persistence.errors import NotReplicated, PersistenceError, RedisUnavailable
from persistence.model.agents import Agent, TurnPolicy
from persistence.model.session import NewSession
from persistence.model.session import Turn as StoredTurn
from persistence.redis.log_entries import Part
from persistence.redis.outcomes import Absent, Begun, Busy, Opened, Queued, Refused, Replay
from persistence.redis.sessions import SessionStore
from persistence.redis.turn_logs import Following, TurnLogs
from persistence.retry import Attempts, Backoff
from persistence.tasks import retrieve

log = structlog.get_logger()

Found = TypeVar("Found")

ASK_AGAIN_S = (0.01, 0.125)

COMMIT_BACKOFF = Backoff(0.2, 0.2)


class Hydrates(Protocol):
    """The hydrator, which turns may not import: they reach Postgres through nothing else."""

    async def with_session(
        self,
        session_id: str,
        operation: Callable[[], Awaitable[Found | Absent]],
        create: Callable[[int], Awaitable[object]] | None = None,
    ) -> Found | None: ...


class Dependencies(msgspec.Struct, frozen=True):
    """What the turns of a pod work with. `queue_wait_s` is how long a message waits for the turns before it."""

    store: SessionStore
    logs: TurnLogs
    hydrator: Hydrates
    run_graph: RunGraph
    aborts: Aborts
    queue_wait_s: float


class Turn:
    """One turn, from its message to its answer, streamed or not."""

    __slots__ = (
        "_access",
        "_deps",
        "_graph",
        "_policy",
        "_streamed",
        "admission",
        "agent",
        "fence",
        "graph_s",
        "id",
        "number",
        "request",
        "session_uuid",
        "state",
    )

    def __init__(
        self,
        deps: Dependencies,
        agent: Agent,
        request: TurnRequest,
        admission: Admission | Unlimited,
        streamed: StreamedTurn | None = None,
    ) -> None:
        self.id = str(uuid7())
        self.agent = agent
        self.request = request
        self.admission = admission
        self.state = NEW
        self.session_uuid = ""
        self.number = 0
        self.fence = 0
        self.graph_s = 0.0
        self._deps = deps
        self._access = request.access
        self._policy = _policy_of(agent, request, admission)
        self._graph: asyncio.Future[GraphOutput] | None = None
        self._streamed = streamed

    def _enter(self, trigger: Trigger) -> None:
        self.state = next_state(self.state, trigger)

    def cancel(self) -> None:
        """Ends the turn, which has been cancelled in Redis."""
        self._enter("cancelled")
        if self._graph is not None:
            self._graph.cancel()

    async def answer(self) -> TurnResult | Attached:
        """Answers the message; Attached, only of a streamed turn, when another turn does so already.

        Raises a Problem or PersistenceError; the turn holds nothing then, or is on its way to give it back.
        """
        request = self.request
        if request.channel and request.channel not in self.agent.definition.channels:
            raise ChannelNotAllowed(f"channel: {request.channel}", field="channel")
        try:
            found = await self._begin()
            if isinstance(found, Begun):
                return await self._run(found)
            if isinstance(found, Replay):
                return self._replay(found)
            return self._attach(found)
        except BaseException as error:
            await self._give_up(error)
            raise

    # ---------------------------------------------------------------------------------------------------------- begin

    async def _begin(self) -> Begun | Replay | Attached:
        """Takes the session, creating, hydrating or waiting for it as need be."""
        request = self.request
        digest = sha256(request.message.encode()).hexdigest()[:16] if request.message_id else ""
        take_session = partial(self._take_session, digest, monotonic() + self._deps.queue_wait_s)
        try:
            found: Begun | Replay | Attached | None = await self._deps.hydrator.with_session(
                request.session_id, take_session, self._create
            )
        except Problem:
            self._enter("refused")
            raise
        assert found is not None, "only without `create` nothing is found"
        return found

    async def _take_session(self, digest: str, deadline_s: float) -> Begun | Replay | Attached | Absent:
        """Asks for the session until it is this turn's, waiting for the turns before it. Raises a Problem."""
        while True:
            outcome = await self._ask(digest)
            match outcome:
                case Begun() | Replay():
                    return outcome
                case Absent():
                    self._enter("absent")
                    return outcome
                case Refused():
                    raise_refusal(outcome, self.admission)
                case Busy(_, True, turn_id) if self._streamed is not None:
                    return Attached(turn_id)
                case Busy(_, False, turn_id) if self._policy.if_busy == "interrupt":
                    self._enter("busy")
                    cancelled = await self._deps.logs.cancel(self.request.session_id, turn_id, self._access)
                    if isinstance(cancelled, Refused):
                        raise_refusal(cancelled)
                case Busy(lease_left_ms, False):
                    raise TurnInProgress(retry_after_s=max(1.0, lease_left_ms / 1000))
                case Busy() | Queued():
                    self._enter("queued" if isinstance(outcome, Queued) else "busy")
                    if monotonic() > deadline_s:
                        raise TurnInProgress("the turns before it took too long", retry_after_s=1)
                    await asyncio.sleep(random.uniform(*ASK_AGAIN_S))  # noqa: S311

    async def _ask(self, digest: str) -> Begun | Absent | Replay | Busy | Queued | Refused:
        """Asks for the session once, with a place among the agent's running turns in hand."""
        await self.admission.hold()
        self._enter("asked")
        outcome = await self._deps.store.begin(
            self.request.session_id,
            self.id,
            self._access,
            self._policy,
            message_id=self.request.message_id,
            digest=digest,
        )
        if isinstance(outcome, Begun):
            self._enter("begun")
            self.admission.began(outcome.rate_ahead_ms)
        else:
            # A turn that waits runs nothing: others may have its place meanwhile.
            self.admission.let_go()
        return outcome

    async def _create(self, ticket: int) -> None:
        """Creates the session that its first message names; a stale ticket leaves it to the next begin. Raises a Problem."""
        definition, request, access = self.agent.definition, self.request, self._access
        # A session that had a token existed once: it has been erased since, and stays so.
        if definition.require_token or (access.authorized and not access.trusted):
            raise SessionNotFound
        new = NewSession(
            id=str(uuid7()),
            session_id=request.session_id,
            agent_id=self.agent.id,
            channel=request.channel or definition.channels[0],
            website_domain=access.website_domain,
            user_id=access.user_id,
            ip_address=request.ip_address,
            user_agent=request.user_agent,
            metadata=request.metadata,
            minted=False,
            hot_ttl_s=definition.hot_ttl_s,
        )
        self.admission.reserve_session()
        opened = await self._deps.store.open(new, ticket=ticket, trusted=access.trusted)
        self.admission.session_created(isinstance(opened, Opened) and opened.created)
        if isinstance(opened, Refused):
            raise_refusal(opened)

    def _replay(self, replay: Replay) -> TurnResult:
        """The answer that was given before. Raises MessageIdReused when it answers another text."""
        session_id, stored = self.request.session_id, replay.turn
        if stored.messages[0].content != self.request.message:
            self._enter("refused")
            raise MessageIdReused(field="message_id")
        self._enter("replayed")
        if self._streamed is not None:
            self._streamed.replay(stored, session_id)
        return TurnResult(stored.messages[-1].content, answer_metadata(stored, session_id, replayed=True))

    def _attach(self, attached: Attached) -> Attached:
        self._enter("attached")
        if self._streamed is not None:
            self._streamed.attach(attached)
        return attached

    # ------------------------------------------------------------------------------------------------- run and commit

    async def _run(self, begun: Begun) -> TurnResult:
        """Runs the graph under the lease and commits its answer."""
        started_s = monotonic()
        session, request = begun.session, self.request
        self.session_uuid, self.number, self.fence = session.id, session.turns + 1, begun.fence
        streamed = self._streamed
        if streamed is not None:
            streamed.begin(self.id, request, self.fence)
        if self.state is CANCELLED_EARLY:
            raise TurnCancelled
        given = graph_input(request, begun, self.agent.definition)
        output = await self._run_graph(given)
        self.graph_s = monotonic() - started_s
        stored = stored_turn(self.id, request, begun, given, output, latency_ms=round(self.graph_s * 1000))
        result = TurnResult(output.response, answer_metadata(stored, request.session_id, replayed=False))
        part = await streamed.seal_answer(result) if streamed is not None else None
        await self._commit(begun, stored, output.context, part)
        if streamed is not None:
            streamed.close()
        return result

    async def _run_graph(self, given: GraphInput) -> GraphOutput:
        """Runs the graph, which ends when it takes too long or the lease is lost. Raises a Problem."""
        limit_s = self.agent.definition.turn_timeout_s
        emit = self._streamed.emit if self._streamed is not None else None
        graph = self._graph = asyncio.ensure_future(self._deps.run_graph(self.agent, given, emit))
        graph.add_done_callback(retrieve)
        try:
            with Lease(self._deps.store, self.request.session_id, self.id, self.fence, self._lose):
                # Not awaited directly: a graph that swallows its cancellation must not outlast the limit.
                await asyncio.wait({graph}, timeout=limit_s)
            if not graph.done():
                raise TurnTimeout(f"no answer in {limit_s:g} s")
            if self.state is CANCELLED:
                raise TurnCancelled
            if self.state is LOST and (graph.cancelled() or graph.exception() is not None):
                raise await self._loss()
            if graph.cancelled():
                raise GraphFailed
            return graph.result()
        finally:
            graph.cancel()

    def _lose(self) -> None:
        self._enter("lost")
        if self._graph is not None:
            self._graph.cancel()

    async def _commit(self, begun: Begun, stored: StoredTurn, context: dict[str, Any] | None, part: Part | None) -> None:
        """Commits, for as long as the lease may hold: an answer has been paid for, and committing twice adds nothing."""
        store = self._deps.store
        attempts = Attempts(COMMIT_BACKOFF, deadline_s=monotonic() + store.lease_ms / 1000)
        while True:
            try:
                committed = await store.commit(begun, stored, self._policy, context, part)
                break
            except NotReplicated:
                # It is stored; a retry waits for the replicas again.
                self._enter("committed")
                raise
            except RedisUnavailable as error:
                pause_s = attempts.next_pause_s(error)
                log.warning("turn.commit_failed", turn_id=self.id, error=str(error))
            await asyncio.sleep(pause_s)
        if committed is None:
            self._enter("lost")
            raise await self._loss()
        self._enter("committed")

    async def _loss(self) -> Problem:
        """Why the turn holds its session no more: its log tells a cancellation from a takeover."""
        if self.state is CANCELLED:
            return TurnCancelled()
        try:
            found = await self._deps.logs.follow(self.request.session_id, self.id, self._access)
        except PersistenceError as error:
            log.warning("turn.end_unknown", turn_id=self.id, error=str(error))
            return TurnSuperseded()
        if isinstance(found, Following) and found.events and found.events[-1].kind == events.TurnCancelled.kind:
            return TurnCancelled()
        return TurnSuperseded()

    # -------------------------------------------------------------------------------------------------------- give up

    async def _give_up(self, error: BaseException) -> None:
        """Gives back what the turn may hold, and ends its log with the reason."""
        streamed = self._streamed
        part = await streamed.seal_failure(error) if streamed is not None else None
        if self.state.holds:
            self._enter("given_up")
            await self._deps.aborts.abort(self.request.session_id, self.id, self.fence, part)
        if streamed is not None:
            streamed.close()


def _policy_of(agent: Agent, request: TurnRequest, admission: Admission | Unlimited) -> TurnPolicy:
    """The agent's policy with what the message and the limits change of it."""
    policy = agent.definition.policy
    if request.if_busy:
        policy = msgspec.structs.replace(policy, if_busy=request.if_busy)
    if admission.mode == "shadow":
        policy = msgspec.structs.replace(policy, rate_shadow=True)
    elif admission.mode == "off":
        policy = msgspec.structs.replace(policy, rate_messages=0)
    return policy
