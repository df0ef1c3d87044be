"""Answers that are sent item by item. A wire is a function from items to bytes and a media type: a file like sse.py."""

import asyncio
from collections.abc import AsyncIterator, Callable

from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from gateway.problems import NO_STORE
from gateway.streams.events import Item

Encode = Callable[[Item], bytes]


class StreamedResponse(StreamingResponse):
    """Sends items as they come; no proxy may hold them back. `on_end` is called once, when nothing more will be sent: also
    when the client left before the first item."""

    def __init__(
        self,
        items: AsyncIterator[Item],
        encode: Encode,
        media_type: str,
        on_end: Callable[[], None],
        headers: dict[str, str] | None = None,
    ) -> None:
        headers = {**NO_STORE, "X-Accel-Buffering": "no", **(headers or {})}
        super().__init__(_encoded(items, encode), headers=headers, media_type=media_type)
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            if scope["method"] == "HEAD":
                # Nothing would be written that could show that the client has gone.
                await Response(headers=dict(self.headers))(scope, receive, send)
            else:
                await self._stream(receive, send)
        finally:
            self._on_end()

    async def _stream(self, receive: Receive, send: Send) -> None:
        """Sends until the last item or until the client leaves. Starlette's task group for this costs a short turn more than
        all its events."""
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


async def _encoded(items: AsyncIterator[Item], encode: Encode) -> AsyncIterator[bytes]:
    async for item in items:
        yield encode(item)
