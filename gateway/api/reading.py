"""Requests in, answers out: reading bodies and queries with their bounds, rendering answers and problems."""

import asyncio
import json
import re
from collections import Counter
from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

import msgspec
from starlette.requests import ClientDisconnect, Request

from gateway.problems import BodyTooLarge, BodyTooSlow, InvalidField, InvalidJson, UnsupportedMediaType
from gateway.streams.events import Cursor, parse_cursor
from persistence.model.storable import MAX_DEPTH, TOO_DEEP, find_unstorable

Body = TypeVar("Body")

_encoder = msgspec.json.Encoder()

MAX_METADATA_DEPTH = 16

_FIELD = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$(?P<where>.*?)`)?$", re.DOTALL)

_CHARSET = re.compile(r"charset\s*=\s*\"?([^\s\";]*)", re.IGNORECASE)


class BodyBounds(msgspec.Struct, frozen=True):
    """How large a body may be and how long it may take; how many bytes, as JSON, its metadata."""

    max_bytes: int
    timeout_s: float
    max_metadata_bytes: int


def read_cursor(request: Request) -> Cursor | None:
    """The cursor of the Last-Event-ID header. Raises InvalidField."""
    try:
        return parse_cursor(request.headers.get("last-event-id"))
    except ValueError as error:
        raise InvalidField(f"Last-Event-ID: {error}", field="Last-Event-ID") from error


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
    """Raises InvalidField for a text or JSON value that cannot be stored."""
    found = find_unstorable(value, max_depth)
    if found is None:
        return
    if found.reason is TOO_DEEP:
        raise InvalidField(f"{field}: nested more than {max_depth} levels deep", field=field)
    where = ".".join([field, *found.path])
    raise InvalidField(f"{where}: {found.reason} cannot be stored", field=where)
