"""One call of the API as the route table and the reference know it."""

from collections.abc import Awaitable, Callable
from typing import Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

Handler = Callable[[Request], Awaitable[Response]]
Guard = Literal["none", "session", "admin"]
EVENT_STREAM, SCRIPT = "text/event-stream", "text/javascript"


class Endpoint(msgspec.Struct, frozen=True):
    """One call: how it is reached, what goes in, what comes out.

    `answers` are types or media types by status, `answer_headers` the headers that belong to them; `errors` are the problem
    statuses it may answer with beside those that every call may; `headers` are the request's that it looks at; `media_types`
    are those of its body.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    answers: dict[int, Any]
    errors: tuple[int, ...] = ()
    body: Any = None
    media_types: tuple[str, ...] = ("application/json",)
    query: Any = None
    headers: tuple[str, ...] = ()
    answer_headers: dict[int, tuple[str, ...]] = {}
    guard: Guard = "none"
