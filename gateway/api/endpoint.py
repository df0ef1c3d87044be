"""One call of the API, as the router and the reference read it. Each API module lists its own beside its handlers."""

from collections.abc import Awaitable, Callable, Sequence
from typing import Any, Literal, Protocol

import msgspec
from starlette.requests import Request
from starlette.responses import Response

Handler = Callable[[Request], Awaitable[Response]]
Guard = Literal["none", "session", "admin"]
EVENT_STREAM, SCRIPT = "text/event-stream", "text/javascript"

BODY_ERRORS = (400, 408, 413, 415, 422)
"""Problem statuses of a call that reads a body."""
SESSION_ERRORS = (401, 403, 404, 429, 500, 503)
"""Of a call about one session."""
ADMIN_ERRORS = (401, 403, 429, 503)
"""Of an operator's call."""
LIMIT_HEADERS = ("RateLimit", "RateLimit-Policy")
"""Answer headers of a call that is charged to limits."""


class Endpoint(msgspec.Struct, frozen=True):
    """One call: how it is reached, what goes in, what comes out.

    `answers` maps statuses to types or media types, `answer_headers` to the headers that belong to them. `errors` are the
    problem statuses of this call, beside those of every call. `headers` are the request headers that it reads.
    `description` says what the summary leaves out; `media_types` are those of the body.
    """

    method: str
    path: str
    handler: Handler
    summary: str
    answers: dict[int, Any]
    errors: tuple[int, ...] = ()
    description: str = ""
    body: Any = None
    media_types: tuple[str, ...] = ("application/json",)
    query: Any = None
    headers: tuple[str, ...] = ()
    answer_headers: dict[int, tuple[str, ...]] = {}
    guard: Guard = "none"


class Api(Protocol):
    """A group of calls, by subject."""

    def endpoints(self) -> Sequence[Endpoint]:
        """Its calls, in the order in which the reference shows them."""
        ...
