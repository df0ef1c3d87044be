"""Requests in, answers out: reading bodies and queries with their bounds, rendering answers and problems."""

import asyncio
import json
import re
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from uuid_utils import uuid7

from gateway.logs import frames
from gateway.problems import (
    BodyTooLarge,
    BodyTooSlow,
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
SHOWN_CHARS = 500
"""Of what a problem says: a name that a client made up can be as long as its body."""
MAX_METADATA_DEPTH = 16
_encoder = msgspec.json.Encoder()
_FIELD = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$(?P<where>.*?)`)?$", re.DOTALL)
_CHARSET = re.compile(r"charset\s*=\s*\"?([^\s\";]*)", re.IGNORECASE)
_NUL, _TOO_DEEP = "NUL characters cannot be stored", "nested too deeply"
NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class BodyBounds(msgspec.Struct, frozen=True):
    """How large a body may be and how long it may take; how many bytes, as JSON, its metadata."""

    max_bytes: int
    timeout_s: float
    max_metadata_bytes: int


class ProblemDocument(msgspec.Struct, omit_defaults=True):
    """An error, after RFC 9457. `code` is for programs; `retryable` when the same request may do better later, after
    `retry_after` seconds; `field` names what is wrong with the request."""

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
    return Response(_encoder.encode(value), status, headers, "application/json")


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


def read_cursor(request: Request) -> Cursor | None:
    """The cursor of the Last-Event-ID header. Raises InvalidField."""
    try:
        return parse_cursor(request.headers.get("last-event-id"))
    except ValueError as error:
        raise InvalidField(f"Last-Event-ID: {error}", field="Last-Event-ID") from error


def problem_response(problem: Problem, request: Request) -> Response:
    """A problem as the answer to a request."""
    body = encode_problem(problem, request_id(request))
    return Response(body, problem.status, problem_headers(problem), "application/problem+json")


def encode_problem(problem: Problem, request_id: str) -> bytes:
    """The one place where errors are rendered."""
    document = ProblemDocument(
        type=f"urn:gateway:problem:{problem.code}",
        title=problem.title,
        status=problem.status,
        code=problem.code,
        detail=_cut(problem.detail) or problem.title,
        request_id=request_id,
        retryable=problem.retryable,
        retry_after=_retry_after(problem),
        field=None if problem.field is None else _cut(problem.field),
    )
    return _encoder.encode(document)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"


def problem_headers(problem: Problem) -> dict[str, str]:
    """The headers that go with a problem, its media type apart."""
    headers = {**NO_STORE, **problem.headers}
    retry_after = _retry_after(problem)
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def _retry_after(problem: Problem) -> int | None:
    return None if problem.retry_after_s is None else max(1, -int(-problem.retry_after_s // 1))


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


async def read_body(request: Request, decoder: "msgspec.json.Decoder[Body]", bounds: BodyBounds) -> Body:
    """The JSON body as the decoder's type. Raises the Problem that tells what is wrong with it."""
    _check_media_type(request)
    raw = await _read_bytes(request, bounds)
    try:
        body = decoder.decode(raw)
        if _may_repeat_names(raw):
            _check_names(raw)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidJson(str(error)) from error
    return body


def _check_media_type(request: Request) -> None:
    given = request.headers.get("content-type", "")
    media_type, _, parameters = given.partition(";")
    media_type = media_type.strip().lower()
    if media_type != "application/json":
        raise UnsupportedMediaType(f"Content-Type is {media_type or 'missing'}")
    charset = _CHARSET.search(parameters) if parameters else None
    if charset is not None and charset[1].lower() not in ("utf-8", "utf8"):
        raise UnsupportedMediaType(f"charset is {charset[1]}, not utf-8")
    encoding = request.headers.get("content-encoding")
    if encoding is not None and encoding.strip().lower() not in ("", "identity"):
        raise UnsupportedMediaType("Content-Encoding: bodies are taken as they are, without compression")


async def _read_bytes(request: Request, bounds: BodyBounds) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdigit() and (len(length) > 18 or int(length) > bounds.max_bytes):
        raise BodyTooLarge(f"at most {bounds.max_bytes} bytes")
    chunks, size = [], 0
    try:
        async with asyncio.timeout(bounds.timeout_s):
            async for chunk in request.stream():
                size += len(chunk)
                if size > bounds.max_bytes:
                    raise BodyTooLarge(f"at most {bounds.max_bytes} bytes")
                chunks.append(chunk)
    except ClientDisconnect as error:
        raise InvalidJson("the body is incomplete") from error
    except TimeoutError as error:
        raise BodyTooSlow(f"more than {bounds.timeout_s:g} s") from error
    return b"".join(chunks)


def _may_repeat_names(raw: bytes) -> bool:
    """Whether JSON may have an object with the same name twice, of which decoders take one, each its own. Encoded anew it
    lacks the other: without escapes, a colon is in the one text exactly when it is in the other."""
    return b"\\u" in raw or raw.count(b":") != _encoder.encode(msgspec.json.decode(raw)).count(b":")


def _check_names(raw: bytes) -> None:
    """Raises InvalidField, with the path of the second of two equal names."""
    repeats: list[tuple[Any, str]] = []

    def build(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        built = dict(pairs)
        if len(built) != len(pairs):
            times = Counter(name for name, _ in pairs)
            repeats.append((built, next(name for name in times if times[name] > 1)))
        return built

    document = json.loads(raw, object_pairs_hook=build, parse_int=float)
    if repeats:
        # The last is the outermost, and part of what was built if anything is.
        where, name = repeats[-1]
        field = ".".join([*(_path(document, where) or []), name])
        raise InvalidField(f"{field}: given twice", field=field)


def _path(value: Any, wanted: Any) -> list[str] | None:
    """Where in a JSON value the very object is that is wanted."""
    if value is wanted:
        return []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        found = _path(item, wanted)
        if found is not None:
            return [str(name), *found]
    return None


def read_query(request: Request, kind: type[Body]) -> Body:
    """The query as a Struct. Raises InvalidField, also for what is given twice and for what is not UTF-8."""
    values: dict[str, str] = {}
    for part in request.scope["query_string"].split(b"&"):
        raw_name, _, raw_value = part.partition(b"=")
        name = _unquote(raw_name, "query")
        if name or raw_value:
            if name in values:
                raise InvalidField(f"{name}: given twice", field=name)
            values[name] = _unquote(raw_value, name)
    try:
        query = msgspec.convert(values, kind, strict=False)
    except msgspec.ValidationError as error:
        raise invalid_field(error) from error
    for name, value in values.items():
        # An agent that cannot exist is not found, as any other that does not.
        if name != "agent_id":
            check_text(value, name)
    return query


def _unquote(raw: bytes, field: str) -> str:
    try:
        return unquote_to_bytes(raw.replace(b"+", b" ")).decode()
    except UnicodeDecodeError as error:
        raise InvalidField(f"{field}: not UTF-8", field=field) from error


def invalid_field(error: msgspec.ValidationError) -> InvalidField:
    """The problem that names the field of a validation error."""
    match = _FIELD.match(str(error))
    what, where = (match["what"], match["where"] or "") if match else (str(error), "")
    # The value itself is not repeated: it may be a secret that was put into the wrong field.
    what = "Invalid enum value" if what.startswith("Invalid enum value") else what
    where = re.sub(r"\[(\d+)\]", r".\1", where.replace("[...]", ""))
    named = re.search(r"field `([^`]+)`", what)
    field = ".".join(part for part in (where.lstrip("."), named[1] if named else "") if part) or "body"
    return InvalidField(f"{field}: {what[0].lower()}{what[1:]}", field=field)


def check_metadata(metadata: dict[str, Any], bounds: BodyBounds) -> None:
    """Raises InvalidField for metadata that are too large, too deep, or cannot be stored."""
    check_text(metadata, "metadata", MAX_METADATA_DEPTH)
    if len(_encoder.encode(metadata)) > bounds.max_metadata_bytes:
        raise InvalidField(f"metadata: more than {bounds.max_metadata_bytes} bytes", field="metadata")


def check_text(value: Any, field: str, max_depth: int = MAX_DEPTH) -> None:
    """Raises InvalidField for what cannot be stored, or not be read again: NUL characters, and JSON nested too deeply."""
    found = _unstorable(value, max_depth)
    if found is None:
        return
    path, why = found
    if why is _TOO_DEEP:
        raise InvalidField(f"{field}: nested more than {max_depth} levels deep", field=field)
    # Put together only now: a long name over many values would be copied for each of them.
    where = ".".join([field, *reversed(path)])
    raise InvalidField(f"{where}: {why}", field=where)


def _unstorable(value: Any, levels: int) -> tuple[list[str], str] | None:
    """What of a value cannot be stored: the names that lead there, the last one first, and why."""
    if levels < 0:
        return [], _TOO_DEEP
    match value:
        case str():
            return ([], _NUL) if "\0" in value else None
        case dict():
            if any("\0" in name for name in value):
                return [], _NUL
            items: Any = value.items()
        case list() | tuple():
            items = enumerate(value)
        case _:
            return None
    for name, item in items:
        found = _unstorable(item, levels - 1)
        if found is not None:
            found[0].append(str(name))
            return found
    return None
