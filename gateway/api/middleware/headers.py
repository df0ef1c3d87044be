"""Headers that every response has: of routes, of Starlette's own answers, of preflights.

By default browsers and proxies cache nothing.
"""

from starlette.types import ASGIApp, Message, Receive, Scope, Send

DEFAULTS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
)


class SafeHeaders:
    """ASGI middleware: adds those of DEFAULTS that a response does not set itself."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def send_safely(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = list(message.get("headers", ()))
                given = {name.lower() for name, _ in headers}
                headers += [default for default in DEFAULTS if default[0] not in given]
                message = {**message, "headers": headers}
            await send(message)

        await self._app(scope, receive, send_safely)
