"""A turn, from begin to commit: the only home of its states.

    waiting ──▶ running ──▶ committed
       │           │
       └───────────┴──────▶ aborted, cancelled or lost: the session is as it was before

A turn belongs to the application, not to the request that asked for it: a visitor who closes the tab ends no turn."""

import asyncio
import random
from hashlib import sha256
from time import monotonic
from typing import Any, Protocol

import msgspec
import structlog
from uuid_utils import uuid7

from gateway.graphs.contract import GraphInput, GraphOutput, RunGraph, storable_output
from gateway.limits.admission import Admission, Outcome, Unlimited
from gateway.metrics import Metrics
from gateway.problems import (
    ChannelNotAllowed,
    Draining,
    GraphFailed,
    MessageIdReused,
    Problem,
    RedisDown,
    SessionNotFound,
    TurnCancelled,
    TurnInProgress,
    TurnSuperseded,
    TurnTimeout,
    problem_of,
)
from gateway.streams import events
from gateway.streams.events import answer_metadata
from gateway.streams.log import TurnLog, TurnWriter, replay_log
from gateway.streams.streams import Streams
from gateway.turns.refusals import raise_refusal
from gateway.turns.request import Attached, AttachedElsewhere, TurnRequest, TurnResult
from persistence.errors import PersistenceError, RedisUnavailable
from persistence.model.agents import Agent, TurnPolicy
from persistence.model.session import Message, NewSession, Turn
from persistence.model.times import iso
from persistence.redis.log_entries import Part
from persistence.redis.outcomes import Absent, Begun, Busy, Opened, Queued, Refused, Replay
from persistence.redis.sessions import SessionStore
from persistence.redis.turn_logs import Following, TurnLogs
from persistence.tasks import retrieve

log = structlog.get_logger()

HYDRATE_ATTEMPTS = 5

ASK_AGAIN_S = (0.02, 0.25)

TRY_AGAIN_S = 0.2

ABORT_WAIT_S = 0.1


class Hydrates(Protocol):
    """What turns need of whoever can read Postgres."""

    async def hydrate(self, session_id: str, ticket: int) -> bool: ...


class Turns:
    """Runs turns. `queue_wait_s` is how long a message waits for the turns before it."""

    def __init__(
        self,
        store: SessionStore,
        logs: TurnLogs,
        streams: Streams,
        hydrator: Hydrates,
        run_graph: RunGraph,
        metrics: Metrics,
        *,
        queue_wait_s: float = 30.0,
    ) -> None:
        self._store = store
        self._logs = logs
        self._streams = streams
        self._hydrator = hydrator
        self._run_graph = run_graph
        self._metrics = metrics
        self._queue_wait_s = queue_wait_s
        self._running: set[asyncio.Task[TurnResult]] = set()
        self._by_id: dict[str, _Running] = {}
        self._aborting: set[asyncio.Task[None]] = set()
        self._draining = False

    async def execute(self, agent: Agent, request: TurnRequest, admission: Admission | None = None) -> TurnResult:
        """Answers one message. Raises a Problem; cancelling the caller does not cancel the turn. Settles the admission."""
        task = self._start(_Running(str(uuid7()), agent, request, admission or Unlimited()))
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise Draining(retry_after_s=1) from None
            raise

    async def stream(self, agent: Agent, request: TurnRequest, admission: Admission | None = None) -> TurnLog | Attached:
        """Begins to answer one message; its log, or the turn that answers it already. Raises a Problem."""
        turn = _Running(str(uuid7()), agent, request, admission or Unlimited())
        turn.opened = asyncio.get_running_loop().create_future()
        task = self._start(turn)
        waits: list[asyncio.Future[Any]] = [task, turn.opened]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if turn.opened.done():
            return turn.opened.result()
        if task.cancelled():
            raise Draining(retry_after_s=1)
        task.result()
        raise Problem

    def _start(self, turn: "_Running") -> asyncio.Task[TurnResult]:
        if self._draining:
            turn.admission.close("refused")
            raise Draining(retry_after_s=1)
        task = asyncio.create_task(self._execute(turn))
        # Also of a task that is cancelled before it has begun; and before whoever waits for the answer goes on.
        task.add_done_callback(lambda _: turn.admission.close(turn.outcome))
        self._running.add(task)
        self._by_id[turn.id] = turn
        task.add_done_callback(self._running.discard)
        task.add_done_callback(retrieve)
        return task

    def cancel(self, turn_id: str) -> None:
        """Stops a turn that has been cancelled in Redis, if it runs here."""
        turn = self._by_id.get(turn_id)
        if turn is not None:
            turn.cancelled = turn.settled = True
            if turn.graph is not None:
                turn.graph.cancel()

    async def drain(self, timeout_s: float) -> None:
        """Takes no new turns, gives the running ones time to end, then aborts them."""
        self._draining = True
        if self._running:
            log.info("turns.draining", running=len(self._running))
            await asyncio.wait(self._running, timeout=timeout_s)
        left = list(self._running)
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await asyncio.gather(*self._aborting, return_exceptions=True)

    async def _execute(self, turn: "_Running") -> TurnResult:
        started = monotonic()
        self._metrics.running.inc()
        outcome, cause = "failed", None
        try:
            result = await self._answer(turn)
            outcome = "replayed" if result.metadata["replayed"] else "completed"
        except Problem as problem:
            outcome = problem.code
            raise
        except PersistenceError as error:
            translated = problem_of(error)
            outcome, cause = translated.code, str(error)
            raise translated from error
        except asyncio.CancelledError:
            outcome = "cancelled"
            raise
        finally:
            del self._by_id[turn.id]
            duration_s = monotonic() - started
            self._metrics.running.dec()
            self._metrics.turns.labels(outcome).inc()
            if outcome == "completed":
                self._metrics.turn_seconds.observe(duration_s)
                self._metrics.graph_seconds.observe(turn.graph_s)
            log.info(
                "turn.completed" if outcome in ("completed", "replayed", "attached") else "turn.failed",
                outcome=outcome,
                **({"error": cause} if cause else {}),
                agent=turn.agent.name,
                session=turn.session_uuid,
                turn_id=turn.id,
                number=turn.number,
                duration_ms=round(duration_s * 1000, 1),
                graph_ms=round(turn.graph_s * 1000, 1),
            )
        return result

    async def _answer(self, turn: "_Running") -> TurnResult:
        if turn.request.channel and turn.request.channel not in turn.agent.definition.channels:
            raise ChannelNotAllowed(f"channel: {turn.request.channel}", field="channel")
        try:
            begun = await self._begin(turn)
            if isinstance(begun, Replay):
                return self._replay(turn, begun)
            return await self._run(turn, begun)
        except BaseException as error:
            await self._give_up(turn, error)
            raise

    async def _begin(self, turn: "_Running") -> Begun | Replay:
        """Takes the session, creating, hydrating or waiting for it as need be."""
        request = turn.request
        deadline = monotonic() + self._queue_wait_s
        digest = sha256(request.message.encode()).hexdigest()[:16] if request.message_id else ""
        absences, waited = 0, False
        while True:
            outcome = await self._ask(turn, digest, waited)
            match outcome:
                case Begun() | Replay():
                    turn.settled = isinstance(outcome, Replay)
                    return outcome
                case Absent(ticket):
                    absences += 1
                    if absences > HYDRATE_ATTEMPTS:
                        raise RedisDown("the session left Redis again and again", retry_after_s=1)
                    if not await self._hydrator.hydrate(request.session_id, ticket):
                        await self._create(turn, ticket)
                case Refused():
                    turn.settled = not waited
                    raise_refusal(outcome, turn.admission)
                case Busy(_, True, turn_id) if turn.opened is not None:
                    turn.settled, turn.outcome = True, "repeated"
                    turn.opened.set_result(Attached(turn_id))
                    raise AttachedElsewhere
                case Busy(_, False, turn_id) if turn.policy.if_busy == "interrupt":
                    cancelled = await self._logs.cancel(request.session_id, turn_id, turn.access)
                    if isinstance(cancelled, Refused):
                        raise_refusal(cancelled)
                case Busy(lease_left_ms, False):
                    turn.settled = True
                    raise TurnInProgress(retry_after_s=max(1.0, lease_left_ms / 1000))
                case Busy() | Queued():
                    waited = True
                    if monotonic() > deadline:
                        raise TurnInProgress("the turns before it took too long", retry_after_s=1)
                    await asyncio.sleep(random.uniform(*ASK_AGAIN_S) / 2)  # noqa: S311

    async def _ask(self, turn: "_Running", digest: str, waited: bool) -> Begun | Absent | Replay | Busy | Queued | Refused:
        """Asks for the session once, with a place among the agent's running turns in hand."""
        request = turn.request
        try:
            await turn.admission.hold()
        except Problem:
            turn.settled = not waited
            raise
        outcome = await self._store.begin(
            request.session_id,
            turn.id,
            turn.access,
            turn.policy,
            message_id=request.message_id,
            digest=digest,
        )
        if isinstance(outcome, Begun):
            turn.outcome = "ran"
            turn.admission.began(outcome.rate_ahead_ms)
        else:
            # Who waits runs nothing: its place is for others meanwhile.
            turn.admission.let_go()
        return outcome

    async def _create(self, turn: "_Running", ticket: int) -> None:
        """Creates the session that its first message names; a stale ticket leaves it to the next begin."""
        definition, request = turn.agent.definition, turn.request
        access = request.access
        # A token is given out for a session that is there: one that is not has been erased since, and stays so.
        if definition.require_token or (access.authorized and not access.trusted):
            raise SessionNotFound
        new = NewSession(
            id=str(uuid7()),
            session_id=request.session_id,
            agent_id=turn.agent.id,
            channel=request.channel or definition.channels[0],
            website_domain=access.website_domain,
            user_id=access.user_id,
            ip_address=request.ip_address,
            user_agent=request.user_agent,
            metadata=request.metadata,
            minted=False,
            hot_ttl_s=definition.hot_ttl_s,
        )
        try:
            turn.admission.reserve_session()
        except Problem:
            turn.settled = True
            raise
        opened = await self._store.open(new, ticket=ticket, trusted=access.trusted)
        turn.admission.session_created(isinstance(opened, Opened) and opened.created)
        if isinstance(opened, Refused):
            turn.settled = True
            raise_refusal(opened)

    async def _run(self, turn: "_Running", begun: Begun) -> TurnResult:
        """Runs the graph under the lease and commits what it answers."""
        session, request, definition = begun.session, turn.request, turn.agent.definition
        started = monotonic()
        turn.session_uuid, turn.number, turn.fence = session.id, session.turns + 1, begun.fence
        writer = self._open_log(turn)
        channel = request.channel or session.channel
        graph_input = GraphInput(
            history=begun.history[-definition.history_window :] if definition.history_window else [],
            user_input=request.message,
            message_uuid=str(uuid7()),
            context=session.context,
            metadata=request.metadata,
            session_id=request.session_id,
            channel=channel,
        )
        output = await self._run_leased(turn, graph_input)
        turn.graph_s = monotonic() - started
        output = storable_output(output)
        latency_ms = round(turn.graph_s * 1000)
        seq = session.message_count + 1
        stored = Turn(
            id=turn.id,
            message_id=request.message_id or None,
            seq=seq,
            messages=[
                Message(
                    id=graph_input.message_uuid,
                    role="user",
                    content=request.message,
                    created_at=iso(begun.now_ms),
                    audio_url=request.audio_url,
                    audio_duration_ms=request.audio_duration_ms,
                    metadata=request.metadata or None,
                ),
                Message(
                    id=str(uuid7()),
                    role="assistant",
                    content=output.response,
                    # Redis' clock plus what has passed since: one clock for all timestamps.
                    created_at=iso(begun.now_ms + latency_ms),
                    tokens_used=output.tokens_used,
                    latency_ms=latency_ms,
                    model_used=output.model_used,
                ),
            ],
            metadata=output.metadata,
            fence=begun.fence,
        )
        result = TurnResult(output.response, answer_metadata(stored, request.session_id, replayed=False))
        part = None
        if writer is not None:
            if not writer.has_text:
                writer.emit(events.TextDelta(output.response))
            part = await writer.seal(events.TurnCompleted(result.response, result.metadata))
        await self._commit(turn, begun, stored, output.context, part)
        if writer is not None:
            writer.publish()
            self._streams.close_log(turn.id)
        return result

    def _open_log(self, turn: "_Running") -> TurnWriter | None:
        """The log of a turn that somebody wants streamed."""
        if turn.opened is None:
            return None
        request = turn.request
        turn.writer = self._streams.open_log(request.session_id, turn.id, turn.fence)
        started = events.TurnStarted(turn.id, request.session_id, request.message, request.message_id or None)
        turn.writer.emit(started)
        turn.opened.set_result(turn.writer.log)
        return turn.writer

    def _replay(self, turn: "_Running", replay: Replay) -> TurnResult:
        """The answer that was given before."""
        session_id, stored = turn.request.session_id, replay.turn
        if stored.messages[0].content != turn.request.message:
            raise MessageIdReused(field="message_id")
        turn.outcome = "repeated"
        if turn.opened is not None:
            turn.opened.set_result(replay_log(stored, session_id))
        return TurnResult(stored.messages[-1].content, answer_metadata(stored, session_id, replayed=True))

    async def _run_leased(self, turn: "_Running", graph_input: GraphInput) -> GraphOutput:
        """Runs the graph; renews the lease meanwhile; ends it when it takes too long or the lease is lost."""
        limit_s = turn.agent.definition.turn_timeout_s
        session_id, lease_s = turn.request.session_id, self._store.lease_ms / 1000
        emit = turn.writer.emit if turn.writer is not None else None
        graph = asyncio.ensure_future(self._run_graph(turn.agent, graph_input, emit))
        graph.add_done_callback(retrieve)
        turn.graph = graph
        if turn.cancelled:
            graph.cancel()
        renewing: asyncio.Task[None] | None = None

        async def renew() -> None:
            while not graph.done():
                try:
                    if not await self._store.renew(session_id, turn.id, turn.fence):
                        turn.settled = True
                        graph.cancel()
                        return
                except RedisUnavailable as error:
                    # The lease may outlive the fault; if it does not, the fence keeps the commit out.
                    log.warning("turn.renew_failed", turn_id=turn.id, error=str(error))
                await asyncio.sleep(lease_s / 3)

        def start_renewing() -> None:
            nonlocal renewing
            renewing = asyncio.create_task(renew())

        # Most turns end before their lease needs renewing: a timer is cheaper than a task.
        timer = asyncio.get_running_loop().call_later(lease_s / 3, start_renewing)
        try:
            # Not awaited directly: a graph that swallows its cancellation must not outlast the limit.
            await asyncio.wait({graph}, timeout=limit_s)
            if not graph.done():
                raise TurnTimeout(f"no answer in {limit_s:g} s")
            if turn.cancelled:
                raise TurnCancelled
            if turn.settled and (graph.cancelled() or graph.exception() is not None):
                raise await self._lost(turn)
            if graph.cancelled():
                raise GraphFailed
            return graph.result()
        finally:
            graph.cancel()
            timer.cancel()
            if renewing is not None:
                renewing.cancel()

    async def _commit(
        self, turn: "_Running", begun: Begun, stored: Turn, context: dict[str, Any] | None, part: Part | None
    ) -> None:
        # An answer has been paid for, and committing twice adds nothing: as long as the lease may hold there is hope.
        deadline = monotonic() + self._store.lease_ms / 1000
        while True:
            try:
                committed = await self._store.commit(begun, stored, turn.policy, context, part)
                break
            except RedisUnavailable as error:
                if monotonic() > deadline:
                    raise
                log.warning("turn.commit_failed", turn_id=turn.id, error=str(error))
            await asyncio.sleep(TRY_AGAIN_S)
        turn.settled = True
        if committed is None:
            raise await self._lost(turn)

    async def _lost(self, turn: "_Running") -> Problem:
        """What became of a turn that does not hold its session any more: its log tells a cancellation from a takeover."""
        if turn.cancelled:
            return TurnCancelled()
        try:
            found = await self._logs.follow(turn.request.session_id, turn.id, turn.access)
        except PersistenceError as error:
            log.warning("turn.end_unknown", turn_id=turn.id, error=str(error))
            return TurnSuperseded()
        if isinstance(found, Following) and found.events and found.events[-1].kind == events.TurnCancelled.kind:
            return TurnCancelled()
        return TurnSuperseded()

    async def _give_up(self, turn: "_Running", error: BaseException) -> None:
        """Lets go of what the turn holds, and ends its log with the reason."""
        part = None
        if turn.writer is not None:
            part = await turn.writer.seal(_last_event(error))
        if not turn.settled:
            aborting = asyncio.create_task(self._abort(turn, part))
            self._aborting.add(aborting)
            aborting.add_done_callback(self._aborting.discard)
            # Usually done at once; while Redis is away the visitor is not kept waiting for a second call.
            await asyncio.wait({aborting}, timeout=ABORT_WAIT_S)
        if turn.writer is not None:
            turn.writer.publish()
            self._streams.close_log(turn.id)

    async def _abort(self, turn: "_Running", part: Part | None) -> None:
        deadline = monotonic() + self._store.lease_ms / 1000
        while True:
            try:
                await self._store.abort(turn.request.session_id, turn.id, turn.fence, part)
                return
            except RedisUnavailable as error:
                log.warning("turn.abort_failed", turn_id=turn.id, error=str(error))
            # A pod that stops does not wait for Redis: the lease ends the turn, as it would end that of a dead pod.
            if self._draining or monotonic() > deadline:
                return
            await asyncio.sleep(TRY_AGAIN_S)


def _last_event(error: BaseException) -> events.Event:
    """The terminal event of a turn that was not answered."""
    match error:
        case TurnCancelled():
            return events.TurnCancelled()
        case Problem():
            problem = error
        case PersistenceError():
            problem = problem_of(error)
        case asyncio.CancelledError():
            problem = Draining()
        case _:
            problem = Problem()
    return events.TurnFailed(problem.code, problem.title, problem.retryable)


class _Running:
    """A turn on its way. `settled` once it holds nothing in Redis that would have to be let go.

    `opened` is there when the turn is to be streamed, and gets its log when it begins. `outcome` is what it came to so far.
    """

    __slots__ = (
        "access",
        "admission",
        "agent",
        "cancelled",
        "fence",
        "graph",
        "graph_s",
        "id",
        "number",
        "opened",
        "outcome",
        "policy",
        "request",
        "session_uuid",
        "settled",
        "writer",
    )

    def __init__(self, turn_id: str, agent: Agent, request: TurnRequest, admission: Admission | Unlimited) -> None:
        self.id = turn_id
        self.agent = agent
        self.request = request
        self.admission = admission
        self.outcome: Outcome = "refused"
        self.access = request.access
        self.policy: TurnPolicy = agent.definition.policy
        if request.if_busy:
            self.policy = msgspec.structs.replace(self.policy, if_busy=request.if_busy)
        if admission.mode == "shadow":
            self.policy = msgspec.structs.replace(self.policy, rate_shadow=True)
        elif admission.mode == "off":
            self.policy = msgspec.structs.replace(self.policy, rate_messages=0)
        self.session_uuid = ""
        self.number = 0
        self.fence = 0
        self.graph_s = 0.0
        self.settled = False
        self.cancelled = False
        self.graph: asyncio.Future[GraphOutput] | None = None
        self.writer: TurnWriter | None = None
        self.opened: asyncio.Future[TurnLog | Attached] | None = None
