"""What is stored: sessions, turns, messages, and the records that carry them to Postgres.

The session hash, the JSON of a turn (its field `t:<n>`), the fields of a record (outbox entry, dead letter), the log of a
turn and an agent's definition are stored formats. A version reads what the one before it wrote, and passes over fields,
members and kinds of events that it does not know: adding one, at the end and with a default for where it is missing, leaves
`keys.FORMAT` as it is. FORMAT rises when something that is there changes its meaning or goes, or a fact, status, channel
or role is added; then a version that reads both has to be everywhere before the one that writes the new. What is of a
later format than this version's is refused and left as it is: NewerFormat. Timestamps are ISO-8601 UTC text with
milliseconds, as operators read them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from persistence.errors import Damaged, NewerFormat
from persistence.model.fields import FORMAT, HEADER, HEADER_BYTES, READERS, RECORD_FORMAT, whole
from persistence.model.session import ChatMessage, Record, Session, Turn

_encoder = msgspec.json.Encoder()

Stored = TypeVar("Stored")


class _Chat(msgspec.Struct):
    """What a graph is given of a turn: to read no more of fifty messages saves a turn some tens of microseconds."""

    messages: list[ChatMessage]


_turn_decoder = msgspec.json.Decoder(Turn)

_chat_decoder = msgspec.json.Decoder(_Chat)

_session_decoder = msgspec.json.Decoder(Session)

_FIELD = re.compile(r"required field `(\w+)`|`\$\.(\w+)")
"""Where in an object msgspec found what it cannot read."""

_FACT = re.compile(r"t:[1-9][0-9]{0,8}|(opened|ended|timeout|erased):[0-9]+")


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
        for (field, read), value in zip(READERS, values[1:], strict=True):
            fields[field] = read(value.decode())  # type: ignore[union-attr]  # AttributeError is caught
        field = "agent_id"
        if not fields[field] and fields["status"] != "erased":
            raise ValueError("is empty")
    except (ValueError, AttributeError, RecursionError, msgspec.DecodeError) as error:
        raise Damaged(where, field, unreadable(error)) from error
    return Session(**fields)


def decode_hash(fields: Mapping[bytes, bytes], hot_turns: int, where: str) -> tuple[Session, list[ChatMessage]]:
    """A session from its hash, and the messages of up to `hot_turns` of its newest turns, oldest first.

    Raises Damaged, naming the field.
    """
    session = decode_session([fields.get(name) for name in HEADER_BYTES], where)
    numbers = {}
    for field in ("first_hot", "flushed"):
        try:
            numbers[field] = whole(fields[field.encode()].decode())
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
