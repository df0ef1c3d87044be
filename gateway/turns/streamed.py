"""A turn as a stream: its log, from the event that says it has started to the one that says how it ended."""

import asyncio

from gateway.problems import Draining, Problem, TurnCancelled, problem_of
from gateway.streams import events
from gateway.streams.log import TurnLog, TurnWriter, replay_log
from gateway.streams.streams import Streams
from gateway.turns.request import Attached, TurnRequest, TurnResult
from persistence.errors import PersistenceError
from persistence.model.session import Turn as StoredTurn
from persistence.redis.log_entries import Part


class StreamedTurn:
    """The log of a streamed turn. `opened` gets what the caller reads: this log, an older one, or another turn's id."""

    def __init__(self, streams: Streams) -> None:
        self.opened: asyncio.Future[TurnLog | Attached] = asyncio.get_running_loop().create_future()
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
        writer = self._writer = self._streams.open_log(request.session_id, turn_id, fence)
        writer.emit(events.TurnStarted(turn_id, request.session_id, request.message, request.message_id or None))
        self.opened.set_result(writer.log)

    def emit(self, event: events.Event) -> None:
        """Adds an event of the graph."""
        if self._writer is not None:
            self._writer.emit(event)

    async def seal_answer(self, result: TurnResult) -> Part | None:
        """Ends the log with the answer, which is shown once it is committed. What the commit has to store of the log."""
        writer = self._writer
        if writer is None:
            return None
        if not writer.has_text:
            writer.emit(events.TextDelta(result.response))
        return await writer.seal(events.TurnCompleted(result.response, result.metadata))

    async def seal_failure(self, error: BaseException) -> Part | None:
        """Ends the log, if it has begun, with the reason. What the abort has to store of the log."""
        return await self._writer.seal(_end_of(error)) if self._writer is not None else None

    def close(self) -> None:
        """Shows the end of the log to its readers."""
        if self._writer is not None:
            self._writer.publish()
            self._streams.close_log(self._turn_id)


def _end_of(error: BaseException) -> events.Event:
    """The terminal event of a turn that failed."""
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
