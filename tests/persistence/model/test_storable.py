"""What cannot be stored is found with its place and its reason; what is made storable has nothing of the kind left."""

from typing import Any

import pytest

from persistence.model.storable import (
    MAX_DEPTH,
    NUL,
    SURROGATE,
    TOO_DEEP,
    find_unstorable,
    storable_json,
    storable_text,
    storable_value,
)


def nested(levels: int) -> Any:
    value: Any = "leaf"
    for _ in range(levels):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "path", "reason"),
    [
        ("a\0b", [], NUL),
        ("Grüße \ud800", [], SURROGATE),
        ({"a": ["b", "\0"]}, ["a", "1"], NUL),
        ({"a": {"b\0": 1}}, ["a"], NUL),
        ({"a": {"\udfff": 1}}, ["a"], SURROGATE),
        ([{"a": ("x", "\udc00")}], ["0", "a", "1"], SURROGATE),
    ],
)
def test_what_cannot_be_stored_is_found(value: Any, path: list[str], reason: str) -> None:
    assert find_unstorable(value) == (path, reason)
    assert find_unstorable(storable_value(value)) is None


@pytest.mark.parametrize("value", ["", "Grüße 🙂", 7, 1.5, None, True, {"a": [1, {"b": "c"}]}, nested(MAX_DEPTH)])
def test_what_can_be_stored_is_left_as_it_is(value: Any) -> None:
    assert find_unstorable(value) is None
    assert storable_value(value) == value
    assert storable_json(value) == value


def test_nesting_has_a_limit() -> None:
    found = find_unstorable(nested(MAX_DEPTH + 1))
    assert found is not None
    assert found.reason is TOO_DEEP
    assert find_unstorable(nested(3), 3) is None
    assert find_unstorable(nested(4), 3) is not None
    with pytest.raises(ValueError, match="64 levels"):
        storable_json(nested(MAX_DEPTH + 1))


def test_output_becomes_json_that_can_be_stored() -> None:
    assert storable_text("a\0b\ud800") == "a\ufffdb\ufffd"
    assert storable_json({"a\0": {1}, "b": float("nan"), "c": ("\udfff",)}) == {
        "a\ufffd": [1],
        "b": None,
        "c": ["\ufffd"],
    }
    with pytest.raises(ValueError, match="not JSON"):
        storable_json({"a": object()})
