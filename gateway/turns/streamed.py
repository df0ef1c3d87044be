"""A turn as a stream: its log, from the event that says it has started to the one that says how it ended."""

import asyncio
from typing import Any

from gateway.problems import Draining, Problem, TurnCancelled, problem_of
from gateway.streams.events import turn_started
from gateway.streams.follow import Streams
from gateway.streams.log import TurnLog, TurnWriter, replay_log
from gateway.turns.request import Attached, TurnRequest, TurnResult
from persistence.errors import PersistenceError
from persistence.model.session import Turn as StoredTurn
from persistence.redis.log_entries import Part
from persistence.redis.turn_logs import EventLogs


class StreamedTurn:
    """The log of a streamed turn. `opened` gets what the caller reads: this log, an older one, or another turn's id."""

    def __init__(self, logs: EventLogs, streams: Streams) -> None:
        self.opened: asyncio.Future[TurnLog | Attached] = asyncio.get_running_loop().create_future()
        self._logs = logs
        self._streams = streams
        self._turn_id = ""
        self._writer: TurnWriter | None = None

    def replay(self, stored: StoredTurn, session_id: str) -> None:
        """Hands on the log of a turn that was answered before."""
        self.opened.set_result(replay_log(stored, session_id))

    def attach(self, attached: Attached) -> None:
        """Hands on the turn that answers the message already."""
        self.opened.set_result(attached)

    def begin(self, turn_id: str, request: TurnRequest, fence: int) -> None:
        """Begins the log and hands it on."""
        self._turn_id = turn_id
        writer = self._writer = TurnWriter(self._logs, request.session_id, turn_id, fence)
        writer.emit("turn.started", turn_started(turn_id, request.session_id, request.message, request.message_id))
        self._streams.own(turn_id, writer.log)
        self.opened.set_result(writer.log)

    def emit(self, kind: str, data: Any) -> None:
        """Adds an event of the graph."""
        if self._writer is not None:
            self._writer.emit(kind, data)

    async def seal_answer(self, result: TurnResult) -> Part | None:
        """Ends the log with the answer, which is shown once it is committed. What the commit has to store of the log."""
        writer = self._writer
        if writer is None:
            return None
        if not writer.has_text:
            writer.emit("text.delta", {"text": result.response})
        return await writer.seal("turn.completed", result)

    async def seal_failure(self, error: BaseException) -> Part | None:
        """Ends the log, if it has begun, with the reason. What the abort has to store of the log."""
        return await self._writer.seal(*_end_of(error)) if self._writer is not None else None

    def close(self) -> None:
        """Shows the end of the log to its readers."""
        if self._writer is not None:
            self._writer.publish()
            self._streams.disown(self._turn_id)


def _end_of(error: BaseException) -> tuple[str, dict[str, Any]]:
    """The terminal event of a turn that failed."""
    match error:
        case TurnCancelled():
            return "turn.cancelled", {}
        case Problem():
            problem = error
        case PersistenceError():
            problem = problem_of(error)
        case asyncio.CancelledError():
            problem = Draining()
        case _:
            problem = Problem()
    return "turn.failed", {"code": problem.code, "title": problem.title, "retryable": problem.retryable}
