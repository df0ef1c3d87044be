"""Requests in, answers out: reading bodies and queries with their bounds, rendering answers and problems."""

import re
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from uuid_utils.compat import uuid7

from gateway.logs import frames
from gateway.problems import (
    BodyTooLarge,
    InvalidField,
    InvalidJson,
    MethodNotAllowed,
    NotFound,
    Problem,
    UnsupportedMediaType,
    problem_of,
)
from gateway.streams import Cursor, parse_cursor
from persistence.errors import PersistenceError

log = structlog.get_logger()

Body = TypeVar("Body")

MAX_DEPTH = 64
_encoder = msgspec.json.Encoder()
_FIELD = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$(?P<where>.*?)`)?$", re.DOTALL)
NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class ProblemDocument(msgspec.Struct, omit_defaults=True):
    """An error, after RFC 9457. `retry_after` is in seconds, `field` names what is wrong with the request."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    request_id: str
    retryable: bool = False
    retry_after: float | None = None
    field: str | None = None


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A JSON answer."""
    return Response(_encoder.encode(value), status, {**NO_STORE, **(headers or {})}, "application/json")


class EventStream(StreamingResponse):
    """An answer that says when it has ended, also one whose events nobody began to read."""

    def __init__(self, events: AsyncIterator[bytes], headers: dict[str, str], on_end: Callable[[], None]) -> None:
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def event_stream(
    events: AsyncIterator[bytes], on_end: Callable[[], None], headers: dict[str, str] | None = None
) -> Response:
    """Server-Sent Events (WHATWG HTML, section 9.2); no proxy may hold them back. `on_end` is called at their end."""
    return EventStream(events, {**NO_STORE, "X-Accel-Buffering": "no", **(headers or {})}, on_end)


def read_cursor(request: Request) -> Cursor | None:
    """The cursor of the Last-Event-ID header. Raises InvalidField."""
    try:
        return parse_cursor(request.headers.get("last-event-id"))
    except ValueError as error:
        raise InvalidField(f"Last-Event-ID: {error}", field="Last-Event-ID") from error


def problem_response(problem: Problem, request: Request) -> Response:
    """The one place where errors are rendered."""
    retry_after = None if problem.retry_after_s is None else max(1, -int(-problem.retry_after_s // 1))
    document = ProblemDocument(
        type=f"urn:gateway:problem:{problem.code}",
        title=problem.title,
        status=problem.status,
        code=problem.code,
        detail=problem.detail or problem.title,
        request_id=request_id(request),
        retryable=problem.retryable,
        retry_after=retry_after,
        field=problem.field,
    )
    headers = {**NO_STORE, **problem.headers}
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(_encoder.encode(document), problem.status, headers, "application/problem+json")


def request_id(request: Request) -> str:
    """The request's id: made here, never taken from the client."""
    if not hasattr(request.state, "request_id"):
        request.state.request_id = str(uuid7())
    return str(request.state.request_id)


async def on_problem(request: Request, error: Exception) -> Response:
    """Handler of Problem."""
    assert isinstance(error, Problem)
    return problem_response(error, request)


async def on_persistence_error(request: Request, error: Exception) -> Response:
    """Handler of what the stores raise."""
    assert isinstance(error, PersistenceError)
    log.warning("request.failed", error=f"{type(error).__name__}: {error}", request_id=request_id(request))
    return problem_response(problem_of(error), request)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Handler of what Starlette raises itself."""
    assert isinstance(error, HTTPException)
    known: dict[int, type[Problem]] = {404: NotFound, 405: MethodNotAllowed, 413: BodyTooLarge}
    problem = known.get(error.status_code, Problem)()
    problem.status = error.status_code
    response = problem_response(problem, request)
    if error.headers:
        response.headers.update(error.headers)
    return response


async def on_unexpected(request: Request, error: Exception) -> Response:
    """Handler of everything else: a defect. The text of the error stays in the log."""
    if not hasattr(request.state, "crashed"):
        # Once, though it is rendered for the page by api/cors.py and then comes to Starlette's own handler.
        request.state.crashed = True
        log.error("request.crashed", error=type(error).__name__, frames=frames(error), request_id=request_id(request))
    return problem_response(Problem(), request)


async def read_body(request: Request, decoder: "msgspec.json.Decoder[Body]", limit_bytes: int) -> Body:
    """The JSON body as the decoder's type. Raises the Problem that tells what is wrong with it."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(f"Content-Type is {media_type or 'missing'}")
    length = request.headers.get("content-length", "")
    if length.isdigit() and int(length) > limit_bytes:
        raise BodyTooLarge(f"at most {limit_bytes} bytes")
    chunks, size = [], 0
    try:
        async for chunk in request.stream():
            size += len(chunk)
            if size > limit_bytes:
                raise BodyTooLarge(f"at most {limit_bytes} bytes")
            chunks.append(chunk)
    except ClientDisconnect as error:
        raise InvalidJson("the body is incomplete") from error
    try:
        return decoder.decode(b"".join(chunks))
    except msgspec.ValidationError as error:
        raise invalid_field(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJson(str(error)) from error


def read_query(request: Request, kind: type[Body]) -> Body:
    """The query as a Struct. Raises InvalidField."""
    try:
        query = msgspec.convert(dict(request.query_params), kind, strict=False)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from error
    for name, value in request.query_params.items():
        # An agent that cannot exist is not found, as any other that does not.
        if name != "agent_id":
            check_text(value, name)
    return query


def invalid_field(error: msgspec.ValidationError) -> InvalidField:
    """The problem that names the field of a validation error."""
    match = _FIELD.match(str(error))
    what, where = (match["what"], match["where"] or "") if match else (str(error), "")
    # The value itself is not repeated: it may be a secret that was put into the wrong field.
    what = "Invalid enum value" if what.startswith("Invalid enum value") else what
    named = re.search(r"field `([^`]+)`", what)
    field = ".".join(part for part in (where.lstrip("."), named[1] if named else "") if part) or "body"
    return InvalidField(f"{field}: {what[0].lower()}{what[1:]}", field=field)


def check_text(value: Any, field: str, depth: int = 0) -> None:
    """Raises InvalidField for what cannot be stored, or not be read again: NUL characters, and JSON nested too deeply."""
    if depth > MAX_DEPTH:
        name = field.partition(".")[0]
        raise InvalidField(f"{name}: nested more than {MAX_DEPTH} levels deep", field=name)
    match value:
        case str():
            if "\0" in value:
                raise InvalidField(f"{field}: NUL characters cannot be stored", field=field)
        case dict():
            for name, item in value.items():
                check_text(name, field)
                check_text(item, f"{field}.{name}", depth + 1)
        case list():
            for index, item in enumerate(value):
                check_text(item, f"{field}.{index}", depth + 1)
