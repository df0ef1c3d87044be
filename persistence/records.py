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
from datetime import UTC, datetime
from typing import Annotated, Any, Literal
from uuid import UUID

import msgspec

from persistence.errors import Damaged, NewerFormat
from persistence.keys import FORMAT

Channel = Literal["text", "voice", "phone"]
Role = Literal["user", "assistant", "system"]
Count = Annotated[int, msgspec.Meta(ge=0)]
Status = Literal["active", "ended", "timeout", "erased"]

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
"""The fields of a session that describe it, in the order in which scripts return them (lua/prelude). A record of format 1
has each as a field of its own."""


class Message(msgspec.Struct, omit_defaults=True):
    """One message of a turn. `tokens_used`, `latency_ms` (of the turn) and `model_used` belong to assistant messages."""

    id: str
    role: Role
    content: str
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
    """A durable fact on its way to Postgres: the session as of `revision`, and the turn if the fact is one (`t:<n>`)."""

    entry: str
    fact: str
    session: Session
    turn: Turn | None


class StoredMessage(Message, kw_only=True):
    """A message of a transcript: with its number in the session, its turn, and that turn's number."""

    seq: int
    turn_id: str
    turn: int
    message_id: str | None = None


_encoder = msgspec.json.Encoder()
_turn_decoder = msgspec.json.Decoder(Turn)
_session_decoder = msgspec.json.Decoder(Session)
_object_decoder = msgspec.json.Decoder(dict[str, Any])
_FIELD = re.compile(r"required field `(\w+)`|`\$\.(\w+)")
"""Where in an object msgspec found what it cannot read."""
_FACT = re.compile(r"t:[1-9][0-9]{0,8}|(opened|ended|timeout|erased):[0-9]+")
_CHANNELS = frozenset(("text", "voice", "phone", ""))
_STATUSES = frozenset(("active", "ended", "timeout", "erased"))


def iso(ms: int) -> str:
    """Milliseconds since 1970 as stored text."""
    return datetime.fromtimestamp(ms / 1000, UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{ms % 1000:03d}Z"


def iso_from(moment: datetime) -> str:
    """A moment with a time zone as stored text."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.") + f"{moment.microsecond // 1000:03d}Z"


def moment(text: str) -> datetime:
    """Stored text as a moment. Raises ValueError."""
    if not text.endswith("Z"):
        raise ValueError("not a time in UTC")
    return datetime.fromisoformat(text)


def encode_turn(turn: Turn) -> bytes:
    return _encoder.encode(turn)


def encode_object(value: Mapping[str, Any]) -> str:
    return _encoder.encode(value).decode()


def decode_turn(raw: bytes | None, where: str, field: str) -> Turn:
    """A turn from its stored JSON. Raises Damaged."""
    if raw is None:
        raise Damaged(where, field, "is missing")
    try:
        return _turn_decoder.decode(raw)
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


def decode_session(values: Sequence[bytes], where: str) -> Session:
    """A session from the values of HEADER. Raises Damaged, naming the field."""
    if len(values) != len(HEADER):
        raise Damaged(where, "header", f"has {len(values)} values")
    text: dict[str, str] = {}
    field = "format"
    try:
        for field, value in zip(HEADER, values, strict=True):
            text[field] = value.decode()
        field = "format"
        _check_format(text[field], where)
        field = "minted"
        if text[field] not in ("0", "1"):
            raise Damaged(where, field, "is neither 0 nor 1")
        field = "channel"
        if text[field] not in _CHANNELS:
            raise Damaged(where, field, "is no channel")
        field = "status"
        if text[field] not in _STATUSES:
            raise Damaged(where, field, "is no status")
        numbers = {}
        for field in ("message_count", "turns", "revision"):
            numbers[field] = int(text[field])
        objects = {}
        for field in ("context", "metadata"):
            objects[field] = _object_decoder.decode(text[field])
        return Session(
            id=text["id"],
            session_id=text["session_id"],
            agent_id=text["agent_id"],
            channel=text["channel"],  # type: ignore[arg-type]  # checked above
            status=text["status"],  # type: ignore[arg-type]  # checked above
            user_id=text["user_id"],
            website_domain=text["website_domain"],
            ip_address=text["ip_address"],
            user_agent=text["user_agent"],
            started_at=text["started_at"],
            last_activity_at=text["last_activity_at"],
            ended_at=text["ended_at"],
            minted=text["minted"] == "1",
            context=objects["context"],
            metadata=objects["metadata"],
            message_count=numbers["message_count"],
            turns=numbers["turns"],
            revision=numbers["revision"],
        )
    except (ValueError, AttributeError, RecursionError, msgspec.DecodeError) as error:
        raise Damaged(where, field, unreadable(error)) from error


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
        if _FACT.fullmatch(fact) is None:
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
    return Record(entry.decode(), fact, session, turn)


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
    checks: tuple[tuple[str, Callable[[str], object]], ...] = (
        ("id", UUID),
        ("agent_id", UUID),
        ("started_at", moment),
        ("last_activity_at", moment),
        ("ended_at", moment),
    )
    for name, check in checks:
        value = getattr(session, name)
        # What is erased needs no more than its id: also a session that lost its agent can be erased.
        if (name == "ended_at" or (name == "agent_id" and session.status == "erased")) and not value:
            continue
        try:
            check(value)
        except ValueError as error:
            raise Damaged(where, name, unreadable(error)) from error
    turn = None
    if fact.startswith("t:"):
        turn = decode_turn(turn_json, where, "turn")
    return Record(entry.decode(), fact, session, turn)


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
