"""The events of a turn's stream: one type a kind, their cursors, and the items that readers get.

The one place in Python that names kinds. A new kind is a subclass of `Event` here; codec, terminal kinds and the API
reference follow from the classes, and tests compare the widget's types with them. In a log events are kept encoded (kind
and JSON), so that each is encoded once for Redis and all readers, and a kind of a later version passes through unread."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, ClassVar, NamedTuple, Self

import msgspec

from persistence.model.session import Turn
from persistence.redis.log_entries import LoggedEvent

_encode = msgspec.json.Encoder().encode

SHOWN = 2**53
"""As the number of a cursor: the reader has seen the whole turn. Exact in JavaScript, beyond any event's number."""


class Cursor(NamedTuple):
    """A reader's position: `epoch`, the fence under which the turn ran, and the number of the last event seen.

    Its text `<epoch>-<number>` is the event's id on the wire.
    """

    epoch: int
    number: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """The cursor of its text. Raises ValueError."""
        epoch, separator, number = text.partition("-")
        if not separator or not epoch.isdecimal() or not number.isdecimal() or len(text) > 40:
            raise ValueError("not <epoch>-<n>")
        return cls(int(epoch), int(number))

    def __str__(self) -> str:
        return f"{self.epoch}-{self.number}"


class Event(msgspec.Struct, frozen=True):
    """An event before it is numbered. Its fields are its data on the wire; `terminal` kinds end the stream, and
    `example` is what the reference shows."""

    kind: ClassVar[str]
    terminal: ClassVar[bool] = False
    example: ClassVar[Mapping[str, Any]] = {}

    @classmethod
    def data_type(cls) -> Any:
        """The type of the event's data on the wire."""
        return cls

    @classmethod
    def from_data(cls, data: bytes) -> Self:
        """The event of its data as JSON. Raises msgspec.DecodeError."""
        return msgspec.json.decode(data, type=cls)

    def to_data(self) -> bytes:
        """The event's data as JSON on one line."""
        return _encode(self)


class TurnStarted(Event, frozen=True, omit_defaults=True):
    """The turn has begun. Always the first event, unless the log no longer reaches back to it."""

    kind: ClassVar[str] = "turn.started"
    example: ClassVar[Mapping[str, Any]] = {
        "turn_id": "0196b6a5-3c07-7a98-8e12-6d4b90f1a2c4",
        "session_id": "session_1234567890_abc123xyz",
    }

    turn_id: Annotated[str, msgspec.Meta(description="The turn's UUID: names the turn when its stream is resumed")]
    session_id: Annotated[str, msgspec.Meta(description="The session's id")]
    message: Annotated[str, msgspec.Meta(description="The visitor's message, for the visitor's other tabs and devices")] = ""
    message_id: Annotated[
        str | None, msgspec.Meta(description="The `message_id` or Idempotency-Key that the message was sent with")
    ] = None


class TextDelta(Event, frozen=True):
    """A piece of the answer's text."""

    kind: ClassVar[str] = "text.delta"
    example: ClassVar[Mapping[str, Any]] = {"text": "You said:"}

    text: Annotated[str, msgspec.Meta(description="The text to append")]


class Custom(Event, frozen=True):
    """What the graph wrote to LangGraph's custom stream. The event's data is that object itself."""

    kind: ClassVar[str] = "custom"
    example: ClassVar[Mapping[str, Any]] = {"step": "searching", "query": "delivery to Ghent"}

    value: Annotated[dict[str, Any], msgspec.Meta(description="The object; a value of another type comes as `value`")]

    @classmethod
    def data_type(cls) -> Any:
        """Any JSON object."""
        return dict[str, Any]

    @classmethod
    def from_data(cls, data: bytes) -> Self:
        """The event of its data as JSON. Raises msgspec.DecodeError."""
        return cls(msgspec.json.decode(data, type=dict[str, Any]))

    def to_data(self) -> bytes:
        """The event's data as JSON on one line."""
        return _encode(self.value)


class TurnCompleted(Event, frozen=True):
    """The turn is committed. Ends the stream."""

    kind: ClassVar[str] = "turn.completed"
    terminal: ClassVar[bool] = True
    example: ClassVar[Mapping[str, Any]] = {
        "response": "You said: Hello",
        "metadata": {"message_count": 2, "replayed": False},
    }

    response: Annotated[str, msgspec.Meta(description="The whole answer, which may differ from the deltas put together")]
    metadata: Annotated[
        dict[str, Any],
        msgspec.Meta(description="What the graph returned, and beside it what `AnswerMetadata` names"),
    ]


class TurnFailed(Event, frozen=True):
    """The turn ended without an answer, and the session is as it was before. Ends the stream."""

    kind: ClassVar[str] = "turn.failed"
    terminal: ClassVar[bool] = True
    example: ClassVar[Mapping[str, Any]] = {"code": "graph_failed", "title": "The agent failed", "retryable": True}

    code: Annotated[str, msgspec.Meta(description="A problem's code, or `turn_lost` when the pod that ran the turn is gone")]
    title: Annotated[str, msgspec.Meta(description="What happened, in a sentence for people")]
    retryable: Annotated[bool, msgspec.Meta(description="Whether sending the message again may help")]


class TurnCancelled(Event, frozen=True):
    """The turn was cancelled, and the session is as it was before. Ends the stream."""

    kind: ClassVar[str] = "turn.cancelled"
    terminal: ClassVar[bool] = True


class LogReset(Event, frozen=True):
    """The log does not reach back to the reader's cursor: show the transcript anew, and go on from this event's id."""

    kind: ClassVar[str] = "log.reset"


KINDS: dict[str, type[Event]] = {event.kind: event for event in Event.__subclasses__()}

TERMINAL = frozenset(kind for kind, event in KINDS.items() if event.terminal)

TURN_LOST = TurnFailed("turn_lost", "The turn ended without an answer", retryable=True)


def numbered(number: int, event: Event) -> LoggedEvent:
    """An event as logs keep it."""
    return LoggedEvent(number, event.kind, event.to_data())


def decode_event(logged: LoggedEvent) -> Event | None:
    """A logged event as its type; None for a kind of a later version. Raises msgspec.DecodeError."""
    event = KINDS.get(logged.kind)
    return None if event is None else event.from_data(logged.data)


class Batch(msgspec.Struct, frozen=True):
    """Events of one epoch, in order, that are there at once: a wire sends them in one write."""

    epoch: int
    events: Sequence[LoggedEvent]

    def decoded(self) -> Iterator[tuple[Cursor, Event]]:
        """The events as types, with their cursors; those of a later version are passed over."""
        for logged in self.events:
            event = decode_event(logged)
            if event is not None:
                yield Cursor(self.epoch, logged.number), event


class Heartbeat(msgspec.Struct, frozen=True):
    """Nothing has happened for a while: a wire sends something that proxies see and clients ignore."""


Item = Batch | Heartbeat
"""What a reader of a stream gets."""

HEARTBEAT = Heartbeat()


def reset_at(cursor: Cursor) -> Batch:
    """Tells a reader to begin anew, from this cursor on."""
    return Batch(cursor.epoch, [numbered(cursor.number, LogReset())])


def answer_metadata(turn: Turn, session_id: str, *, replayed: bool) -> dict[str, Any]:
    """The metadata of a turn's answer: what the graph returned, and the gateway's own fields."""
    return {
        **turn.metadata,
        "session_id": session_id,
        "turn_id": turn.id,
        "message_count": turn.seq + len(turn.messages) - 1,
        "latency_ms": turn.messages[-1].latency_ms,
        "replayed": replayed,
    }
