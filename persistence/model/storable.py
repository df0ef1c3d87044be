"""What Redis and Postgres can both store of a text or JSON value."""

import re
from typing import Any

import msgspec

MAX_OUTPUT_DEPTH = 64

_UNSTORABLE = re.compile("[\0\ud800-\udfff]")


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
    """The value as it will be read again, with every text in it made storable, and null for NaN and the infinities.

    Raises ValueError for what JSON cannot hold or what is nested too deeply to be read everywhere.
    """
    try:
        # Sets, dataclasses and the like become plain by being encoded, and only then show the text in them.
        plain = storable_value(msgspec.json.decode(msgspec.json.encode(storable_value(value))))
    except (TypeError, ValueError, ArithmeticError, RecursionError) as error:
        raise ValueError(f"not JSON: {type(error).__name__}") from error
    if _deeper(plain, MAX_OUTPUT_DEPTH):
        raise ValueError(f"nested more than {MAX_OUTPUT_DEPTH} levels deep")
    return plain


def _deeper(value: Any, depth: int) -> bool:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return depth < 0 or any(_deeper(item, depth - 1) for item in items)
