"""What is stored: sessions, turns, messages, and the records that carry them to Postgres.

The session hash, the JSON of a turn (its field `t:<n>`), the fields of a record (outbox entry, dead letter), the log of a
turn and an agent's definition are stored formats. A version reads what the one before it wrote, and passes over fields,
members and kinds of events that it does not know: adding one, at the end and with a default for where it is missing, leaves
`keys.FORMAT` as it is. FORMAT rises when something that is there changes its meaning or goes, or a fact, status, channel
or role is added; then a version that reads both has to be everywhere before the one that writes the new. What is of a
later format than this version's is refused and left as it is: NewerFormat. Timestamps are ISO-8601 UTC text with
milliseconds, as operators read them.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, Literal, TypeVar

import msgspec

from persistence.errors import Damaged, NewerFormat
from persistence.keys import FORMAT

Channel = Literal["text", "voice", "phone"]
Role = Literal["user", "assistant", "system"]
Count = Annotated[int, msgspec.Meta(ge=0)]
Status = Literal["active", "ended", "timeout", "erased"]
Stored = TypeVar("Stored")

RECORD_FORMAT = 2
"""The newest format of records that this version reads; that of everything else is `keys.FORMAT`."""

HEADER = (
    "format",
    "id",
    "session_id",
    "agent_id",
    "channel",
    "status",
    "user_id",
    "website_domain",
    "ip_address",
    "user_agent",
    "started_at",
    "last_activity_at",
    "ended_at",
    "message_count",
    "context",
    "metadata",
    "minted",
    "turns",
    "revision",
)
"""The fields of a session that describe it, in the order in which scripts return them (lua/prelude); a record of format 1
has each as a field, one of format 2 has the session as JSON."""


class ChatMessage(msgspec.Struct):
    """What a graph is given of a message."""

    id: str
    role: Role
    content: str


class Message(ChatMessage, omit_defaults=True):
    """One message of a turn. `tokens_used`, `latency_ms` (of the turn) and `model_used` belong to assistant messages."""

    created_at: str
    audio_url: str | None = None
    audio_duration_ms: int | None = None
    tokens_used: int | None = None
    latency_ms: int | None = None
    model_used: str | None = None
    metadata: dict[str, Any] | None = None


class Turn(msgspec.Struct, omit_defaults=True):
    """A committed turn. `seq` numbers its first message within the session, from 1; the others follow.

    `metadata` is what the client was answered with, so that a retry gets the same. `fence` is the turn's place among all
    turns begun, and the epoch of its events; 0 when it came back from Postgres, where it is not kept.
    """

    id: str
    message_id: str | None
    seq: int
    messages: list[Message]
    metadata: dict[str, Any] = {}
    fence: int = 0


class _Chat(msgspec.Struct):
    """What a graph is given of a turn: to read no more of fifty messages saves a turn some tens of microseconds."""

    messages: list[ChatMessage]


class Session(msgspec.Struct, kw_only=True):
    """A session without its messages. Empty text stands for a fact that is not known; a channel always is, unless the
    session was erased while it was damaged."""

    id: str
    session_id: str
    agent_id: str
    channel: Channel | Literal[""]
    status: Status
    user_id: str
    website_domain: str
    ip_address: str
    user_agent: str
    started_at: str
    last_activity_at: str
    ended_at: str
    message_count: Count
    context: dict[str, Any]
    metadata: dict[str, Any]
    minted: bool
    turns: Count
    revision: Count


class Record(msgspec.Struct):
    """A durable fact on its way to Postgres: the session as of `revision`, and the turn if the fact is one (`t:<n>`).

    `bytes` is what it counts on the outbox.
    """

    entry: str
    fact: str
    session: Session
    turn: Turn | None
    bytes: int = 0


class StoredMessage(Message, kw_only=True):
    """A message of a transcript: with its number in the session, its turn, and that turn's number."""

    seq: int
    turn_id: str
    turn: int
    message_id: str | None = None


_encoder = msgspec.json.Encoder()
_turn_decoder = msgspec.json.Decoder(Turn)
_chat_decoder = msgspec.json.Decoder(_Chat)
_HEADER_BYTES = tuple(name.encode() for name in HEADER)
_session_decoder = msgspec.json.Decoder(Session)
_object_decoder = msgspec.json.Decoder(dict[str, Any])
_FIELD = re.compile(r"required field `(\w+)`|`\$\.(\w+)")
"""Where in an object msgspec found what it cannot read."""
_FACT = re.compile(r"t:[1-9][0-9]{0,8}|(opened|ended|timeout|erased):[0-9]+")
_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def iso(ms: int) -> str:
    """Milliseconds since 1970 as stored text."""
    # Whole numbers all the way: as seconds with a fraction some moments would lose a millisecond.
    return iso_from(_EPOCH + timedelta(milliseconds=ms))


def iso_from(moment: datetime) -> str:
    """A moment with a time zone as stored text."""
    return moment.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00") + "Z"


def moment(text: str) -> datetime:
    """Stored text as a moment. Raises ValueError."""
    if not text.endswith("Z"):
        raise ValueError("not a time in UTC")
    return datetime.fromisoformat(text)


def ms_of(text: str) -> int:
    """Stored text as milliseconds since 1970. Raises ValueError."""
    return round(moment(text).timestamp() * 1000)


def encode_turn(turn: Turn) -> bytes:
    return _encoder.encode(turn)


def encode_session(session: Session) -> bytes:
    """A session as it travels with its records."""
    return _encoder.encode(session)


def encode_object(value: Mapping[str, Any]) -> str:
    return _encoder.encode(value).decode()


def decode_turn(raw: bytes | None, where: str, field: str) -> Turn:
    """A turn from its stored JSON. Raises Damaged."""
    return _decode(_turn_decoder, raw, where, field)


def decode_turns(raw: Sequence[bytes | None], first: int, where: str) -> list[Turn]:
    """Turns of a session from their stored JSON, the first numbered `first`. Raises Damaged, naming the field."""
    return [decode_turn(turn, where, f"t:{first + i}") for i, turn in enumerate(raw)]


def _decode(decoder: msgspec.json.Decoder[Stored], raw: bytes | None, where: str, field: str) -> Stored:
    if raw is None:
        raise Damaged(where, field, "is missing")
    try:
        return decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(where, field, unreadable(error)) from error


def unreadable(error: Exception) -> str:
    """Why a stored value could not be read, in words that hold nothing of it: what is damaged may be anybody's text."""
    return f"cannot be read: {type(error).__name__}"


def _check_format(text: str, where: str, newest: int = FORMAT) -> None:
    if text == str(FORMAT):
        return
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) > newest:
        raise NewerFormat(where, "format", f"{text} is not a format this version reads")
    raise Damaged(where, "format", "is not a format this version reads")


def decode_session(values: Sequence[bytes | None], where: str) -> Session:
    """A session from the values of HEADER. Raises Damaged, naming the field."""
    if len(values) != len(HEADER):
        raise Damaged(where, "header", f"has {len(values)} values")
    # Before all else: nothing is known of what a later format has to have.
    _check_format((values[0] or b"").decode(errors="replace"), where)
    fields: dict[str, Any] = {}
    field = ""
    try:
        for (field, read), value in zip(_READERS, values[1:], strict=True):
            fields[field] = read(value.decode())  # type: ignore[union-attr]  # AttributeError is caught
        field = "agent_id"
        if not fields[field] and fields["status"] != "erased":
            raise ValueError("is empty")
    except (ValueError, AttributeError, RecursionError, msgspec.DecodeError) as error:
        raise Damaged(where, field, unreadable(error)) from error
    return Session(**fields)


def _uuid(text: str) -> str:
    if not _UUID.fullmatch(text):
        raise ValueError("no UUID")
    return text


def _moment(text: str) -> str:
    moment(text)
    return text


def _whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError("no whole number")
    return int(text)


def _one_of(*known: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError("not one of those that there are")
        return text

    return read


_READERS: tuple[tuple[str, Callable[[str], Any]], ...] = tuple(
    zip(
        HEADER[1:],
        (
            _uuid,
            str,
            lambda text: text and _uuid(text),
            _one_of("text", "voice", "phone", ""),
            _one_of("active", "ended", "timeout", "erased"),
            str,
            str,
            str,
            str,
            _moment,
            _moment,
            lambda text: text and _moment(text),
            _whole,
            _object_decoder.decode,
            _object_decoder.decode,
            lambda text: _one_of("0", "1")(text) == "1",
            _whole,
            _whole,
        ),
        strict=True,
    )
)
"""How each field of HEADER, but for the format, is read. What lua/begin leaves to be looked at is looked at here: Redis
has no time to spare."""


def decode_hash(fields: Mapping[bytes, bytes], hot_turns: int, where: str) -> tuple[Session, list[ChatMessage]]:
    """A session from its hash, and the messages of up to `hot_turns` of its newest turns, oldest first.

    Raises Damaged, naming the field.
    """
    session = decode_session([fields.get(name) for name in _HEADER_BYTES], where)
    numbers = {}
    for field in ("first_hot", "flushed"):
        try:
            numbers[field] = _whole(fields[field.encode()].decode())
        except (KeyError, ValueError) as error:
            raise Damaged(where, field, unreadable(error)) from error
    if numbers["flushed"] > session.turns:
        raise Damaged(where, "flushed", "is beyond the turns")
    if b"unflushed" not in fields:
        raise Damaged(where, "unflushed", "is missing")
    messages: list[ChatMessage] = []
    for number in range(max(numbers["first_hot"], session.turns - hot_turns + 1), session.turns + 1):
        field = f"t:{number}"
        messages += _decode(_chat_decoder, fields.get(field.encode()), where, field).messages
    return session, messages


def decode_record(entry: bytes, fields: Sequence[bytes]) -> Record:
    """A record from an outbox entry's id and its fields as [name, value, ...]. Raises Damaged.

    Ids and times of format 2 are looked at when they go to Postgres, which refuses what is none (DataRefused).
    """
    by_name = dict(zip(fields[::2], fields[1::2], strict=False))
    if by_name.get(b"format") != b"2":
        return _decode_record_1(entry, by_name)
    name = b""
    try:
        name = b"fact"
        fact = by_name[name].decode()
        if not is_fact(fact):
            raise Damaged(_outbox_entry(entry), "fact", "is no fact")
        name = b"turn"
        turn_json = by_name[name]
        turn = _turn_decoder.decode(turn_json) if fact.startswith("t:") else None
        name = b"session"
        session = _session_decoder.decode(by_name[name])
        name = b"session_id"
        if not session.session_id or session.session_id.encode() != by_name[name]:
            raise Damaged(_outbox_entry(entry), "session_id", "is empty, or not the session's own")
    except KeyError as error:
        raise Damaged(_outbox_entry(entry), name.decode(), "is missing") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        found = _FIELD.search(str(error)) if name == b"session" else None
        field = found[1] or found[2] if found else name.decode()
        raise Damaged(_outbox_entry(entry), field, unreadable(error)) from error
    return Record(entry.decode(), fact, session, turn, _bytes(by_name))


def _bytes(by_name: Mapping[bytes, bytes]) -> int:
    """What a record says that it counts; 0 in records from before they were counted."""
    raw = by_name.get(b"bytes", b"")
    return int(raw) if raw.isdigit() else 0


def _outbox_entry(entry: bytes) -> str:
    return f"outbox entry {entry.decode(errors='replace')}"


def _decode_record_1(entry: bytes, by_name: Mapping[bytes, bytes]) -> Record:
    """A record as the version before wrote it: a field for each fact of the session."""
    where = _outbox_entry(entry)
    # Before all else: nothing is known of what a later format has to have.
    _check_format(by_name.get(b"format", b"").decode(errors="replace"), where, newest=RECORD_FORMAT)
    for name in ("fact", "turn", *HEADER):
        if name.encode() not in by_name:
            raise Damaged(where, name, "is missing")
    fact, turn_json = by_name[b"fact"].decode(errors="replace"), by_name[b"turn"]
    if not is_fact(fact):
        raise Damaged(where, "fact", "is no fact")
    session = decode_session([by_name[name.encode()] for name in HEADER], where)
    if not session.session_id:
        raise Damaged(where, "session_id", "is empty")
    turn = decode_turn(turn_json, where, "turn") if fact.startswith("t:") else None
    return Record(entry.decode(), fact, session, turn, _bytes(by_name))


def is_fact(text: str) -> bool:
    """Whether a text names what a record is about."""
    return _FACT.fullmatch(text) is not None


def transcript(turn: Turn, number: int) -> list[StoredMessage]:
    """The messages of a turn as a transcript shows them, oldest first."""
    return [
        StoredMessage(
            id=message.id,
            role=message.role,
            content=message.content,
            created_at=message.created_at,
            audio_url=message.audio_url,
            audio_duration_ms=message.audio_duration_ms,
            tokens_used=message.tokens_used,
            latency_ms=message.latency_ms,
            model_used=message.model_used,
            metadata=message.metadata,
            seq=turn.seq + index,
            turn_id=turn.id,
            turn=number,
            message_id=turn.message_id if message.role == "user" else None,
        )
        for index, message in enumerate(turn.messages)
    ]
