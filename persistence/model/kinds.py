"""The kinds of values that a field of a session can have: how each is stored as text, and what Postgres gets of it."""

import re
from collections.abc import Callable, Mapping
from typing import Any

import msgspec

from persistence.model.times import iso_from, moment

_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")

_encoder = msgspec.json.Encoder()

_object_decoder = msgspec.json.Decoder(dict[str, Any])


def _same(value: Any) -> Any:
    return value


class Kind(msgspec.Struct, frozen=True):
    """How values are stored. `read` raises ValueError for a text that no version has written.

    The scripts know a kind by its name: `lib/damage.lua` checks stored texts by it, `lib/described.lua` writes JSON by it.
    `to_row` and `from_row` convert to and from what asyncpg takes and gives for a column that is not NULL.
    """

    name: str
    read: Callable[[str], Any] = str
    write: Callable[[Any], str] = str
    to_row: Callable[[Any], Any] = _same
    from_row: Callable[[Any], Any] = _same


def encode_object(value: Mapping[str, Any]) -> str:
    return _encoder.encode(value).decode()


def whole(text: str) -> int:
    """A number that is not negative. Raises ValueError."""
    if not (text.isascii() and text.isdigit()):
        raise ValueError("no whole number")
    return int(text)


def _uuid(text: str) -> str:
    if not _UUID.fullmatch(text):
        raise ValueError("no UUID")
    return text


def _moment(text: str) -> str:
    moment(text)
    return text


def _flag(text: str) -> bool:
    if text not in ("0", "1"):
        raise ValueError("neither 0 nor 1")
    return text == "1"


TEXT = Kind("text")

UUID = Kind("uuid", _uuid, from_row=str)

MOMENT = Kind("moment", _moment, to_row=moment, from_row=iso_from)

WHOLE = Kind("whole", whole)

FLAG = Kind("flag", _flag, lambda value: "1" if value else "0")

OBJECT = Kind("object", _object_decoder.decode, encode_object, encode_object, _object_decoder.decode)


def choice(*known: str) -> Kind:
    """One of these texts."""

    def read(text: str) -> str:
        if text not in known:
            raise ValueError("not one of the known texts")
        return text

    return Kind("text", read)


def optional(kind: Kind) -> Kind:
    """The same kind of text, or the empty one."""
    return Kind(f"{kind.name}?", lambda text: text and kind.read(text), kind.write, kind.to_row, kind.from_row)
