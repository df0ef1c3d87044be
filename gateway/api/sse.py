"""Server-Sent Events (WHATWG HTML, section 9.2): the one place that turns the items of a stream into their bytes."""

from collections.abc import AsyncIterator, Callable

from starlette.responses import Response

from gateway.api.endpoint import EVENT_STREAM
from gateway.api.streaming import StreamedResponse
from gateway.streams.events import Heartbeat, Item

HEARTBEAT = b": heartbeat\n\n"


def encode(item: Item) -> bytes:
    """An item's bytes. Data is JSON on one line, and a heartbeat a comment, which clients ignore."""
    if isinstance(item, Heartbeat):
        return HEARTBEAT
    return b"".join(
        [
            b"id: %d-%d\nevent: %b\ndata: %b\n\n" % (item.epoch, event.number, event.kind.encode(), event.data)
            for event in item.events
        ]
    )


def event_stream(items: AsyncIterator[Item], on_end: Callable[[], None], headers: dict[str, str] | None = None) -> Response:
    """The answer that sends items as Server-Sent Events. `on_end` is called once, when nothing more will be sent."""
    return StreamedResponse(items, encode, EVENT_STREAM, on_end, headers)
