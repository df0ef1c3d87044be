"""What Redis and Postgres can both store of a text or JSON value: no NUL, no lone surrogate, and no nesting so deep that a
reader of JSON gives up. Input is refused for it (`find_unstorable`), output is made storable."""

import re
from typing import Any, NamedTuple

import msgspec

MAX_DEPTH = 64
"""Levels of nesting that are stored."""

NUL, SURROGATE, TOO_DEEP = "NUL characters", "lone surrogates", "nested too deeply"

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


class Unstorable(NamedTuple):
    """What cannot be stored: the names and indexes that lead there, outermost first, and NUL, SURROGATE or TOO_DEEP."""

    path: list[str]
    reason: str


def find_unstorable(value: Any, max_depth: int = MAX_DEPTH) -> Unstorable | None:
    """The first part of a text or JSON value that cannot be stored; None when all of it can. A name that cannot be stored
    counts as its object."""
    found = _find(value, max_depth)
    if found is None:
        return None
    path, reason = found
    return Unstorable(path[::-1], reason)


def _find(value: Any, levels: int) -> tuple[list[str], str] | None:
    """The path, innermost first, and the reason: a name is only made text when there is something to tell."""
    if levels < 0:
        return [], TOO_DEEP
    match value:
        case str():
            return _why(value)
        case dict():
            for name in value:
                if found := _why(name):
                    return found
            items: Any = value.items()
        case list() | tuple():
            items = enumerate(value)
        case _:
            return None
    for name, item in items:
        found = _find(item, levels - 1)
        if found is not None:
            found[0].append(str(name))
            return found
    return None


def _why(text: str) -> tuple[list[str], str] | None:
    # Two quick looks at most texts: this is asked of every message.
    if "\0" in text:
        return [], NUL
    if not text.isascii() and _UNSTORABLE.search(text):
        return [], SURROGATE
    return None


def storable_text(text: str) -> str:
    """Text with U+FFFD in place of NUL and lone surrogates."""
    return _UNSTORABLE.sub("\ufffd", text)


def storable_value(value: Any) -> Any:
    """The value with every text in it made storable."""
    match value:
        case str():
            return storable_text(value)
        case dict():
            return {
                storable_text(name) if isinstance(name, str) else name: storable_value(item) for name, item in value.items()
            }
        case list() | tuple():
            return [storable_value(item) for item in value]
        case _:
            return value


def storable_json(value: Any) -> Any:
    """The value as it will be read again: plain JSON, every text in it made storable, null for NaN and the infinities.

    Raises ValueError for a value that JSON cannot hold, or that is nested more than MAX_DEPTH levels deep.
    """
    try:
        # Sets, dataclasses and the like become plain by being encoded, and only then show the text in them.
        plain = storable_value(msgspec.json.decode(msgspec.json.encode(storable_value(value))))
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"not JSON: {type(error).__name__}") from error
    if find_unstorable(plain) is not None:
        raise ValueError(f"nested more than {MAX_DEPTH} levels deep")
    return plain
