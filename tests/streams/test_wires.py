"""Items and wires: Server-Sent Events, and a second wire as somebody would add it, in one file beside sse.py."""

from collections.abc import AsyncIterator

import httpx
import msgspec
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from gateway.api import sse
from gateway.api.streaming import StreamedResponse
from gateway.streams.events import (
    HEARTBEAT,
    SHOWN,
    Batch,
    Cursor,
    Heartbeat,
    Item,
    TextDelta,
    TurnCompleted,
    TurnStarted,
    numbered,
    reset_at,
)
from persistence.model.session import Access
from persistence.redis.log_entries import LoggedEvent
from tests.streams.steps import Pods, spoken_turn
from tests.support.spoken import Spoken
from tests.support.sse import SseParser

BATCH = Batch(8, [numbered(1, TurnStarted("t", "s", "Hi")), numbered(2, TextDelta("a\nb")), numbered(3, TextDelta("é"))])


def test_a_batch_is_one_piece_of_bytes() -> None:
    assert sse.encode(BATCH) == (
        b'id: 8-1\nevent: turn.started\ndata: {"turn_id":"t","session_id":"s","message":"Hi"}\n\n'
        b'id: 8-2\nevent: text.delta\ndata: {"text":"a\\nb"}\n\n'
        b'id: 8-3\nevent: text.delta\ndata: {"text":"\xc3\xa9"}\n\n'
    )


def test_clients_read_what_was_sent_and_pass_over_heartbeats() -> None:
    parser = SseParser()
    items: list[Item] = [HEARTBEAT, BATCH, reset_at(Cursor(9, SHOWN)), HEARTBEAT]
    read = parser.feed(b"".join([sse.encode(item) for item in items]))
    assert [(event.id, event.kind) for event in read] == [
        ("8-1", "turn.started"),
        ("8-2", "text.delta"),
        ("8-3", "text.delta"),
        (f"9-{SHOWN}", "log.reset"),
    ]
    assert parser.comments == 2


def test_a_kind_of_a_later_version_is_passed_through() -> None:
    later = Batch(8, [LoggedEvent(4, "tool.called", b'{"name":"search"}')])
    assert [event[1:] for event in SseParser().feed(sse.encode(later))] == [("tool.called", {"name": "search"})]


# --------------------------------------------------------------------------------------------------------- a second wire


def encode_lines(item: Item) -> bytes:
    """A wire of JSON lines, for text alone: [epoch, number, text]; an empty line as heartbeat."""
    if isinstance(item, Heartbeat):
        return b"\n"
    lines = []
    for cursor, event in item.decoded():
        match event:
            case TextDelta(text):
                lines.append([*cursor, text])
            case TurnCompleted(response):
                lines.append([*cursor, len(response)])
    return msgspec.json.Encoder().encode_lines(lines)


def line_stream(items: AsyncIterator[Item], ended: list[str]) -> Response:
    return StreamedResponse(items, encode_lines, "application/jsonl", lambda: ended.append("ended"))


async def test_a_second_wire_is_a_function_from_items_to_bytes(pods: Pods, spoken: Spoken, session_id: str) -> None:
    events = await spoken_turn(pods[0], spoken, session_id, "Hello", "one ", "two ")
    turn_id, epoch = events[0].data["turn_id"], events[0].epoch
    ended: list[str] = []

    async def lines(request: Request) -> Response:
        items = await pods[1].pod.streams.open_turn(session_id, turn_id, Access(), Cursor(epoch, 2))
        return line_stream(items, ended)

    app = Starlette(routes=[Route("/lines", lines)])
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://pod") as client:
        answer = await client.get("/lines")
        assert answer.headers["content-type"] == "application/jsonl"
        assert (answer.headers["x-accel-buffering"], answer.headers["cache-control"]) == ("no", "no-store")
        read = [msgspec.json.decode(line) for line in answer.text.splitlines()]
        assert read == [[epoch, 3, "two "], [epoch, 4, len("one two ")]]
        assert ended == ["ended"]
        # Nobody reads the events of a HEAD request: they are not begun.
        assert (await client.head("/lines")).text == ""
        assert ended == ["ended"] * 2
