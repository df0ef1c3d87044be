"""The events of a turn's stream as the reference describes them: one type a kind, whose fields are the event's data."""

from typing import Annotated, Any, ClassVar

import msgspec
from msgspec import Meta


class Event(msgspec.Struct, frozen=True):
    """An event before it is numbered. `terminal` kinds end the stream of a turn."""

    kind: ClassVar[str]
    terminal: ClassVar[bool] = False

    @classmethod
    def data_type(cls) -> Any:
        """The type of the event's data on the wire."""
        return cls


class TurnStarted(Event, frozen=True, omit_defaults=True):
    """The turn has begun. Always the first event, unless the log no longer reaches back to it."""

    kind: ClassVar[str] = "turn.started"

    turn_id: Annotated[str, Meta(description="The turn's UUID: names the turn when its stream is resumed")]
    session_id: Annotated[str, Meta(description="The session's id")]
    message: Annotated[str, Meta(description="The visitor's message, for the visitor's other tabs and devices")] = ""
    message_id: Annotated[
        str | None, Meta(description="The `message_id` or Idempotency-Key that the message was sent with")
    ] = None


class TextDelta(Event, frozen=True):
    """A piece of what a chat model says, while it says it."""

    kind: ClassVar[str] = "text.delta"

    text: Annotated[str, Meta(description="The text to append")]


class Custom(Event, frozen=True):
    """What the graph wrote to LangGraph's custom stream. The event's data is that object itself."""

    kind: ClassVar[str] = "custom"

    value: Annotated[dict[str, Any], Meta(description="The object; a value of another type comes as `value`")]

    @classmethod
    def data_type(cls) -> Any:
        """Any JSON object."""
        return dict[str, Any]


class TurnCompleted(Event, frozen=True):
    """The turn is committed. Ends the turn's stream."""

    kind: ClassVar[str] = "turn.completed"
    terminal: ClassVar[bool] = True

    response: Annotated[str, Meta(description="The whole answer, which may differ from the deltas put together")]
    metadata: Annotated[
        dict[str, Any], Meta(description="What the graph returned, and beside it what `AnswerMetadata` names")
    ]


class TurnFailed(Event, frozen=True):
    """The turn ended without an answer, and the session is as it was before. Ends the turn's stream."""

    kind: ClassVar[str] = "turn.failed"
    terminal: ClassVar[bool] = True

    code: Annotated[str, Meta(description="A problem's code, or `turn_lost` when the pod that ran the turn is gone")]
    title: Annotated[str, Meta(description="What happened, in a sentence for people")]
    retryable: Annotated[bool, Meta(description="Whether sending the message again may help")]


class TurnCancelled(Event, frozen=True):
    """The turn was cancelled, and the session is as it was before. Ends the turn's stream."""

    kind: ClassVar[str] = "turn.cancelled"
    terminal: ClassVar[bool] = True


class LogReset(Event, frozen=True):
    """The log does not reach back to the reader's cursor: show the transcript anew, and go on from this event's id."""

    kind: ClassVar[str] = "log.reset"


KINDS: dict[str, type[Event]] = {event.kind: event for event in Event.__subclasses__()}
