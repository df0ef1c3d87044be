"""The kinds of events: their types, their encoding, and whoever else names them: the script, the reference, the widget."""

import json
import re
from pathlib import Path
from typing import Any, get_args

import httpx
import msgspec
import pytest
from msgspec.structs import FieldInfo, fields

from gateway.streams.events import (
    KINDS,
    SHOWN,
    TERMINAL,
    Batch,
    Cursor,
    Custom,
    Event,
    LogReset,
    TextDelta,
    TurnCancelled,
    TurnCompleted,
    TurnFailed,
    TurnStarted,
    decode_event,
    numbered,
)
from persistence.redis.log_entries import LoggedEvent

ROOT = Path(__file__).parents[2]
CLIENT_KINDS = {"session.replaced", "feed.opened", "connection.lost", "connection.restored"}
"""What the widget's client adds to a stream by itself."""

CASES = [
    (TurnStarted("t", "s", "Hello"), {"turn_id": "t", "session_id": "s", "message": "Hello"}),
    (TurnStarted("t", "s", "Hi", "m"), {"turn_id": "t", "session_id": "s", "message": "Hi", "message_id": "m"}),
    (TextDelta("é\n"), {"text": "é\n"}),
    (Custom({"step": [1, None, {"a": "b"}]}), {"step": [1, None, {"a": "b"}]}),
    (Custom({}), {}),
    (TurnCompleted("Hi", {"turn_id": "t", "n": 1}), {"response": "Hi", "metadata": {"turn_id": "t", "n": 1}}),
    (TurnFailed("c", "It failed", True), {"code": "c", "title": "It failed", "retryable": True}),
    (TurnCancelled(), {}),
    (LogReset(), {}),
]


def test_these_kinds_end_a_stream() -> None:
    assert {"turn.completed", "turn.failed", "turn.cancelled"} == TERMINAL


@pytest.mark.parametrize("event", KINDS.values(), ids=KINDS)
def test_the_example_of_a_kind_is_one(event: type[Event]) -> None:
    data = json.dumps(event.example).encode()
    assert json.loads(event.from_data(data).to_data()) == event.example


@pytest.mark.parametrize(("event", "data"), CASES, ids=[type(event).__name__ for event, _ in CASES])
def test_an_event_is_read_as_it_was_written(event: Event, data: dict[str, Any]) -> None:
    logged = numbered(7, event)
    assert (logged.number, logged.kind, json.loads(logged.data)) == (7, event.kind, data)
    assert b"\n" not in logged.data
    assert decode_event(logged) == event


def test_events_of_other_versions_are_read_for_what_is_known_of_them() -> None:
    assert decode_event(LoggedEvent(1, "tool.called", b'{"name":"search"}')) is None
    assert decode_event(LoggedEvent(1, "text.delta", b'{"text":"a","language":"en"}')) == TextDelta("a")
    # The first version did not log the message.
    old = LoggedEvent(1, "turn.started", b'{"turn_id":"t","session_id":"s"}')
    assert decode_event(old) == TurnStarted("t", "s")
    batch = Batch(3, [old, LoggedEvent(2, "tool.called", b"[]"), numbered(3, TextDelta("a"))])
    assert list(batch.decoded()) == [((3, 1), TurnStarted("t", "s")), ((3, 3), TextDelta("a"))]


def test_what_is_not_an_event_of_its_kind_is_an_error() -> None:
    for kind, data in (("text.delta", b"{}"), ("custom", b"[]"), ("turn.failed", b'{"code":1}'), ("custom", b"{")):
        with pytest.raises(msgspec.DecodeError):
            decode_event(LoggedEvent(1, kind, data))


def test_a_cursor_is_its_text() -> None:
    for cursor in (Cursor(0, 0), Cursor(8, 5), Cursor(3, SHOWN)):
        assert Cursor.parse(str(cursor)) == cursor
    assert str(Cursor(8, 5)) == "8-5"


@pytest.mark.parametrize("text", ["", "7", "7-", "-7", "a-b", "1-2-3", "1--2", "1.5-2", "1-2 3", "1" * 41 + "-1", "-1-2"])
def test_another_text_is_no_cursor(text: str) -> None:
    with pytest.raises(ValueError, match="<epoch>-<n>"):
        Cursor.parse(text)


def test_every_kind_and_every_field_has_a_sentence() -> None:
    for event in KINDS.values():
        assert event.__doc__ and event.__doc__.strip().endswith("."), event
        for field in fields(event):
            assert described(field), f"{event.__name__}.{field.name}"


def described(field: FieldInfo) -> str | None:
    """The description of a field."""
    metas = [part for part in get_args(field.type) if isinstance(part, msgspec.Meta)]
    return metas[0].description if metas else None


def wire_fields(event: type[Event]) -> dict[str, bool] | None:
    """The fields of a kind's data, and whether each may be missing; None where it is any object."""
    return {field.name: not field.required for field in fields(event)} if event.data_type() is event else None


# ----------------------------------------------------------------------------------------------------- who else names kinds


def widget_kinds(text: str) -> dict[str, dict[str, bool] | None]:
    """The kinds in the widget's type `TurnEvent`: their fields, and whether each may be missing."""
    union = text[text.index("export type TurnEvent =") :].partition(";\n\n")[0]
    found: dict[str, dict[str, bool] | None] = {}
    for kind, rest in re.findall(r"\{ type: '([\w.]+)'(.*?) \}", union):
        named = re.findall(r"; (\w+)(\??): ", rest)
        found[kind] = None if "; [name: string]: any" in rest else {name: optional == "?" for name, optional in named}
    return found


def test_the_widgets_types_name_these_kinds_and_fields() -> None:
    text = (ROOT / "gateway/widget/widget.d.ts").read_text()
    found = widget_kinds(text)
    expected = {kind: wire_fields(event) for kind, event in KINDS.items()}
    assert {kind: named for kind, named in found.items() if kind not in CLIENT_KINDS} == expected
    assert found.keys() == KINDS.keys() | CLIENT_KINDS
    # Control: what differs is seen.
    for old, new in (("'text.delta'", "'text'"), ("retryable: boolean", "again: boolean"), ("message?: ", "message: ")):
        assert old in text
        changed = widget_kinds(text.replace(old, new))
        assert {kind: named for kind, named in changed.items() if kind not in CLIENT_KINDS} != expected


def test_the_widget_ends_a_stream_at_the_terminal_kinds() -> None:
    scripts = [path.read_text() for path in sorted((ROOT / "gateway/widget").glob("*.js"))]
    lists = [found for text in scripts for found in re.findall(r"const TERMINAL = \[(.*?)\]", text, re.DOTALL)]
    assert len(lists) == 1
    assert set(re.findall(r"'([\w.]+)'", lists[0])) == TERMINAL


async def test_the_reference_names_these_kinds_and_fields(client: httpx.AsyncClient) -> None:
    document = (await client.get("/openapi.json")).json()
    streams = [found["text/event-stream"] for found in contents(document) if "text/event-stream" in found]
    assert [stream["schema"] for stream in streams] == [{"$ref": "#/components/schemas/Event"}] * 3
    schemas = document["components"]["schemas"]
    assert {form["properties"]["event"]["const"] for form in schemas["Event"]["oneOf"]} == set(KINDS)
    for event in KINDS.values():
        expected = wire_fields(event)
        if expected is not None:
            schema = schemas[event.__name__]
            assert set(schema["properties"]) == set(expected)
            assert set(schema.get("required", [])) == {name for name, optional in expected.items() if not optional}


def contents(part: Any) -> list[dict[str, Any]]:
    """Every `content` in a part of the reference."""
    if isinstance(part, list):
        return [found for value in part for found in contents(value)]
    if not isinstance(part, dict):
        return []
    own = [part["content"]] if isinstance(part.get("content"), dict) else []
    return own + [found for value in part.values() for found in contents(value)]


def test_the_script_that_cancels_a_turn_writes_the_event_that_is_meant() -> None:
    """Redis itself ends the log of a cancelled turn: its pod may be gone."""
    script = (ROOT / "persistence/lua/cancel.lua").read_text()
    written = re.findall(r"'(\[\"[\w.]+\",.*?\])'", script)
    assert [json.loads(event) for event in written] == [[TurnCancelled.kind, json.loads(TurnCancelled().to_data())]]


def test_the_stored_samples_are_read_as_these_types() -> None:
    for path in sorted((ROOT / "tests/data/formats").glob("*/events.json")):
        for key in json.loads(path.read_text()).values():
            for entry in key["value"].values():
                for kind, data in json.loads(entry["events"]):
                    event = decode_event(LoggedEvent(1, kind, json.dumps(data).encode()))
                    assert event is not None
                    assert json.loads(event.to_data()) == data
