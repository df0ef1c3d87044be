"""The codec of stored formats: sessions, turns, messages, and the records that carry them to Postgres.

Stored formats are the session hash, the JSON of a turn (its field `t:<n>`), the fields of a record (outbox entry, dead
letter), the log of a turn and an agent's definition. A version reads what the one before it wrote, and ignores fields,
members and kinds of events that it does not know: adding one, at the end and with a default, leaves FORMAT as it is
(fields of a session: `fields.py`). FORMAT rises when a stored field changes its meaning or goes, or a fact, status, channel
or role is added; then a version that reads both formats has to run everywhere before the one that writes the new one. What
has a later format than this version's is refused and left as it is: NewerFormat. Timestamps are ISO-8601 UTC text with
milliseconds, as operators read them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from persistence.errors import Damaged, NewerFormat
from persistence.model.fields import FORMAT, RECORD_FORMAT, SESSION_FIELDS, SessionFields
from persistence.model.session import Message, Record, Session, Turn

_encoder = msgspec.json.Encoder()

_turn_decoder = msgspec.json.Decoder(Turn)

_FIELD = re.compile(r"required field `(\w+)`|`\$\.(\w+)")
"""Finds the member of an object in the message of a msgspec error."""

_FACT = re.compile(r"t:[1-9][0-9]{0,8}|(opened|ended|timeout|erased):[0-9]+")


def encode_turn(turn: Turn) -> bytes:
    return _encoder.encode(turn)


def encode_session(session: Session) -> bytes:
    """A session as JSON, for a record."""
    return _encoder.encode(session)


def decode_turn(raw: bytes | None, where: str, field: str) -> Turn:
    """A turn from its stored JSON. Raises Damaged."""
    if raw is None:
        raise Damaged(where, field, "is missing")
    try:
        return _turn_decoder.decode(raw)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Damaged(where, field, unreadable(error)) from error


def decode_turns(raw: Sequence[bytes | None], first: int, where: str) -> list[Turn]:
    """Turns of a session from their stored JSON, the first numbered `first`. Raises Damaged, naming the field."""
    return [decode_turn(turn, where, f"t:{first + i}") for i, turn in enumerate(raw)]


def unreadable(error: Exception) -> str:
    """Why a stored value could not be read, without any of it: damaged bytes may be a visitor's text."""
    return f"cannot be read: {type(error).__name__}"


def _check_format(raw: bytes | None, where: str, newest: int = FORMAT) -> None:
    text = (raw or b"").decode(errors="replace")
    if text == str(FORMAT):
        return
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text) > newest:
        raise NewerFormat(where, "format", f"{text} is not a format this version reads")
    raise Damaged(where, "format", "is not a format this version reads")


def decode_session(values: Sequence[bytes | None], where: str, fields: SessionFields = SESSION_FIELDS) -> Session:
    """A session from the values of `fields.names`, None where a field is missing. Raises Damaged, naming the field."""
    if len(values) != len(fields.names):
        raise Damaged(where, "header", f"has {len(values)} values")
    return _read(
        [default if value is None else value for value, (_, default) in zip(values, fields.stored, strict=False)],
        where,
        fields,
    )


def _read(values: Sequence[bytes | None], where: str, fields: SessionFields) -> Session:
    # First of all: nothing is known of the fields of a later format.
    _check_format(values[0], where)
    members: dict[str, Any] = {}
    field = ""
    try:
        for (field, read), value in zip(fields.readers, values[1:], strict=False):
            members[field] = read(value.decode())  # type: ignore[union-attr]  # AttributeError is caught
        field = "agent_id"
        if not members[field] and members["status"] != "erased":
            raise ValueError("is empty")
    except (ValueError, AttributeError, RecursionError, msgspec.DecodeError) as error:
        raise Damaged(where, field, unreadable(error)) from error
    return fields.struct(**members)


def decode_hash(
    raw: Mapping[bytes, bytes], hot_turns: int, where: str, fields: SessionFields = SESSION_FIELDS
) -> tuple[Session, list[Message]]:
    """A session from its hash, and the messages of up to `hot_turns` of its newest turns, oldest first.

    Raises Damaged, naming the field.
    """
    session = _read([raw.get(name, default) for name, default in fields.stored], where, fields)
    first_hot: int = _state(raw, "first_hot", where, fields)
    if _state(raw, "flushed", where, fields) > session.turns:
        raise Damaged(where, "flushed", "is beyond the turns")
    _state(raw, "unflushed", where, fields)
    messages: list[Message] = []
    for number in range(max(first_hot, session.turns - hot_turns + 1), session.turns + 1):
        field = f"t:{number}"
        messages += decode_turn(raw.get(field.encode()), where, field).messages
    return session, messages


def _state(raw: Mapping[bytes, bytes], name: str, where: str, fields: SessionFields) -> Any:
    """The value of a field that only the hash has. Raises Damaged."""
    key, default, read = fields.state_readers[name]
    try:
        return read(raw.get(key, default).decode())  # type: ignore[union-attr]  # AttributeError is caught
    except (ValueError, AttributeError) as error:
        raise Damaged(where, name, unreadable(error)) from error


def decode_record(entry: bytes, raw: Sequence[bytes], fields: SessionFields = SESSION_FIELDS) -> Record:
    """A record from an outbox entry's id and its fields as [name, value, ...]. Raises Damaged.

    Ids and times of format 2 are checked by Postgres when they are flushed: DataRefused.
    """
    by_name = dict(zip(raw[::2], raw[1::2], strict=False))
    where = f"outbox entry {entry.decode(errors='replace')}"
    decode = _decode_record_2 if by_name.get(b"format") == b"2" else _decode_record_1
    fact, session, turn = decode(by_name, where, fields)
    return Record(entry.decode(), fact, session, turn, _bytes(by_name))


def _bytes(by_name: Mapping[bytes, bytes]) -> int:
    """The size that a record carries; 0 in records from before they were counted."""
    raw = by_name.get(b"bytes", b"")
    return int(raw) if raw.isdigit() else 0


def _decode_record_2(by_name: Mapping[bytes, bytes], where: str, fields: SessionFields) -> tuple[str, Session, Turn | None]:
    name = b""
    try:
        name = b"fact"
        fact = by_name[name].decode()
        if not is_fact(fact):
            raise Damaged(where, "fact", "is no fact")
        name = b"turn"
        turn_json = by_name[name]
        turn = _turn_decoder.decode(turn_json) if fact.startswith("t:") else None
        name = b"session"
        session = fields.decoder.decode(by_name[name])
        name = b"session_id"
        if not session.session_id or session.session_id.encode() != by_name[name]:
            raise Damaged(where, "session_id", "is empty, or not the session's own")
    except KeyError as error:
        raise Damaged(where, name.decode(), "is missing") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        found = _FIELD.search(str(error)) if name == b"session" else None
        field = found[1] or found[2] if found else name.decode()
        raise Damaged(where, field, unreadable(error)) from error
    return fact, session, turn


def _decode_record_1(by_name: Mapping[bytes, bytes], where: str, fields: SessionFields) -> tuple[str, Session, Turn | None]:
    """Format 1 has each field of the session as a field of the record."""
    # First of all: nothing is known of the fields of a later format.
    _check_format(by_name.get(b"format"), where, newest=RECORD_FORMAT)
    for name in (b"fact", b"turn"):
        if name not in by_name:
            raise Damaged(where, name.decode(), "is missing")
    fact = by_name[b"fact"].decode(errors="replace")
    if not is_fact(fact):
        raise Damaged(where, "fact", "is no fact")
    session = decode_session([by_name.get(name.encode()) for name in fields.names], where, fields)
    if not session.session_id:
        raise Damaged(where, "session_id", "is empty")
    turn = decode_turn(by_name[b"turn"], where, "turn") if fact.startswith("t:") else None
    return fact, session, turn


def is_fact(text: str) -> bool:
    """Whether a text names what a record is about."""
    return _FACT.fullmatch(text) is not None
