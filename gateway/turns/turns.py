"""The turns that run on this pod: starts them, cancels them by id, drains them, and accounts for each when it ends."""

import asyncio
from functools import partial
from time import monotonic
from typing import Any

import structlog

from gateway.graphs.contract import RunGraph
from gateway.limits.admission import Admission, Unlimited
from gateway.metrics import Metrics
from gateway.problems import Draining, Problem, problem_of
from gateway.streams.log import TurnLog
from gateway.streams.streams import Streams
from gateway.turns.aborts import Aborts
from gateway.turns.request import Attached, TurnRequest, TurnResult
from gateway.turns.streamed import StreamedTurn
from gateway.turns.turn import Dependencies, Hydrates, Turn
from persistence.errors import PersistenceError
from persistence.model.agents import Agent
from persistence.redis.sessions import SessionStore
from persistence.redis.turn_logs import TurnLogs
from persistence.tasks import retrieve

log = structlog.get_logger()

Task = asyncio.Task[TurnResult | Attached]


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
        self._aborts = Aborts(store)
        self._deps = Dependencies(store, logs, hydrator, run_graph, self._aborts, queue_wait_s)
        self._streams = streams
        self._metrics = metrics
        self._running: dict[str, tuple[Turn, Task]] = {}
        self._draining = False

    async def execute(
        self, agent: Agent, request: TurnRequest, admission: Admission | Unlimited | None = None
    ) -> TurnResult:
        """Answers one message. Raises a Problem; cancelling the caller does not cancel the turn. Closes the admission."""
        task = self._start(Turn(self._deps, agent, request, admission or Unlimited()))
        try:
            result = await asyncio.shield(task)
        except asyncio.CancelledError:
            if task.cancelled():
                raise Draining(retry_after_s=1) from None
            raise
        assert isinstance(result, TurnResult), "only streamed turns are attached"
        return result

    async def stream(
        self, agent: Agent, request: TurnRequest, admission: Admission | Unlimited | None = None
    ) -> TurnLog | Attached:
        """Begins to answer one message; its log, or the turn that answers it already. Raises a Problem."""
        streamed = StreamedTurn(self._streams)
        task = self._start(Turn(self._deps, agent, request, admission or Unlimited(), streamed))
        waits: list[asyncio.Future[Any]] = [task, streamed.opened]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        if streamed.opened.done():
            return streamed.opened.result()
        if task.cancelled():
            raise Draining(retry_after_s=1)
        task.result()
        raise Problem

    def _start(self, turn: Turn) -> Task:
        if self._draining:
            turn.admission.close(turn.state.outcome)
            raise Draining(retry_after_s=1)
        task = asyncio.create_task(self._answer(turn))
        self._running[turn.id] = turn, task
        # A callback, for it is called of a task that is cancelled before it runs too, and before the callers go on.
        task.add_done_callback(partial(self._end, turn))
        return task

    def _end(self, turn: Turn, task: Task) -> None:
        del self._running[turn.id]
        retrieve(task)
        turn.admission.close(turn.state.outcome)

    def cancel(self, turn_id: str) -> None:
        """Stops a turn that has been cancelled in Redis, if it runs here."""
        if turn_id in self._running:
            turn, _ = self._running[turn_id]
            turn.cancel()

    async def drain(self, timeout_s: float) -> None:
        """Takes no new turns, gives the running ones time to end, then aborts them."""
        self._draining = True
        self._aborts.begin_drain()
        running = self._tasks()
        if running:
            log.info("turns.draining", running=len(running))
            await asyncio.wait(running, timeout=timeout_s)
        left = self._tasks()
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        await self._aborts.drain()

    def _tasks(self) -> list[Task]:
        return [task for _, task in self._running.values()]

    async def _answer(self, turn: Turn) -> TurnResult | Attached:
        """Answers a turn's message, with its metrics and its line of the log. Raises a Problem."""
        started_s = monotonic()
        self._metrics.running.inc()
        outcome, cause = "failed", None
        try:
            result = await turn.answer()
            outcome = _outcome_of(result)
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
        except Exception:
            # Of a streamed turn nobody else sees it.
            log.error("turn.crashed", turn_id=turn.id, exc_info=True)
            raise
        finally:
            self._account(turn, outcome, cause, monotonic() - started_s)
        return result

    def _account(self, turn: Turn, outcome: str, cause: str | None, duration_s: float) -> None:
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


def _outcome_of(result: TurnResult | Attached) -> str:
    if isinstance(result, Attached):
        return "attached"
    return "replayed" if result.metadata["replayed"] else "completed"
