"""Server-Sent Events (WHATWG HTML, section 9.2): the one place that makes bytes of items."""

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.problems import NO_STORE


class EventStream(StreamingResponse):
    """An answer that says when it has ended, also one whose events nobody began to read."""

    def __init__(self, events: AsyncIterator[bytes], headers: dict[str, str], on_end: Callable[[], None]) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["method"] == "HEAD":
                # Nothing will be sent that could show that the client has gone.
                await Response(headers=dict(self.headers))(scope, receive, send)
            else:
                await self._stream(receive, send)
        finally:
            self._on_end()

    async def _stream(self, receive: Receive, send: Send) -> None:
        """Sends the events until their end or until the client has gone. Starlette does it with a task group, which costs a
        short turn more than all its events."""
        streaming = asyncio.ensure_future(self.stream_response(send))
        gone = asyncio.ensure_future(self.listen_for_disconnect(receive))
        try:
            await asyncio.wait({streaming, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            gone.cancel()
            streaming.cancel()
            await asyncio.wait({streaming})
        if not streaming.cancelled():
            streaming.result()


def event_stream(
    events: AsyncIterator[bytes], on_end: Callable[[], None], headers: dict[str, str] | None = None
) -> Response:
    """Server-Sent Events (WHATWG HTML, section 9.2); no proxy may hold them back. `on_end` is called at their end."""
    return EventStream(events, {**NO_STORE, "X-Accel-Buffering": "no", **(headers or {})}, on_end)
