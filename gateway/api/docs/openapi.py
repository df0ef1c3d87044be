"""The OpenAPI 3.1 document, made from the route table, the types that it names and the problems that there are."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from gateway.api.endpoint import EVENT_STREAM, Endpoint
from gateway.problems import Problem, ProblemDocument
from gateway.streams.events import KINDS, Event
from gateway.turns.request import SessionId

TITLES = {
    400: "The request or its body cannot be read",
    401: "A token or key is missing or wrong",
    403: "Not allowed",
    404: "There is no such thing",
    408: "The request came too slowly",
    409: "Not now, or not twice",
    410: "It is over",
    413: "The body is too large",
    414: "The address is too long",
    415: "The body is not application/json",
    422: "A field is missing or wrong",
    429: "Too much",
    431: "The request's head is too large",
    500: "Something stored cannot be read, or something went wrong in the gateway",
    502: "The agent failed",
    503: "A part of the system is not reachable",
    504: "The agent took too long",
}
ANY_CALL = (400, 408, 414, 431, 500)
"""What every call can be answered with: what cannot be read as HTTP, comes too slowly, is too large; and defects."""

PATH_PARAMETERS: dict[str, dict[str, Any]] = {
    "agent_id": {
        "description": "An agent's UUID or its name",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,100}$"},
    },
    "session_id": {"description": "A session's id", "schema": msgspec.json.schema(SessionId)},
    "turn_id": {"description": "A turn's UUID", "schema": {"type": "string", "format": "uuid"}},
    "version": {"description": "The version that /widget.js names", "schema": {"type": "string", "minLength": 1}},
    "folder": {"description": "A folder of modules", "schema": {"type": "string", "minLength": 1}},
    "file": {"description": "A module's file name", "schema": {"type": "string", "minLength": 1}},
}
HEADER_PARAMETERS: dict[str, dict[str, Any]] = {
    "Idempotency-Key": {
        "description": "Stands for `message_id` where the body has none: makes a retry safe",
        "schema": {"type": "string", "pattern": '^(?:[A-Za-z0-9_.:-]{1,128}|"[A-Za-z0-9_.:-]{1,128}")$'},
    },
    "Last-Event-ID": {
        "description": "The id of the last event that was received; the stream goes on behind it",
        "schema": {"type": "string", "pattern": "^([0-9]{1,15}-[0-9]{1,16})?$"},
    },
    "X-User-Token": {
        "description": "A JWT with which the agent's site says who its visitor is: as `user_token` in bodies",
        "schema": {"type": "string"},
    },
    "If-None-Match": {"description": "The ETag of what is known", "schema": {"type": "string"}},
}
_TEXT = {"type": "string"}


def _event_data(event: type[Event]) -> dict[str, Any]:
    """The schema of an event's data: its type's, except for `custom`, whose data is any object."""
    if event.data_type() is event:
        return {"$ref": f"#/components/schemas/{event.__name__}"}
    return {"type": "object", "description": event.__doc__}


EVENT: dict[str, Any] = {
    "type": "object",
    "description": "An event of a turn. Exactly one that is called turn.completed, turn.failed or turn.cancelled ends it.",
    "properties": {
        "id": {"type": "string", "pattern": "^[0-9]+-[0-9]+$", "description": "What to send as Last-Event-ID"},
        "event": {"type": "string", "enum": list(KINDS)},
        "data": {
            "type": "string",
            "contentMediaType": "application/json",
            "contentSchema": {"anyOf": [_event_data(event) for event in KINDS.values()]},
        },
    },
    "required": ["id", "event", "data"],
}
RESPONSE_HEADERS: dict[str, dict[str, Any]] = {
    "Retry-After": {"description": "Seconds after which to try again", "schema": {"type": "integer", "minimum": 1}},
    "WWW-Authenticate": {"description": "What kind of credentials are needed", "required": True, "schema": _TEXT},
    "ETag": {"description": "Which version this is", "required": True, "schema": _TEXT},
    "Cache-Control": {"description": "How long it may be kept", "required": True, "schema": _TEXT},
    "Location": {"description": "Where it is now", "required": True, "schema": _TEXT},
}


def openapi_document(table: Sequence[Endpoint], version: str) -> dict[str, Any]:
    """The document for a route table."""
    kinds: list[Any] = [ProblemDocument]
    for endpoint in table:
        kinds += [kind for kind in (endpoint.body, endpoint.query, *endpoint.answers.values()) if _is_struct(kind)]
    kinds += [event for event in KINDS.values() if event.data_type() is event]
    kinds = list(dict.fromkeys(kinds))
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    components["ProblemDocument"]["properties"]["code"] = {"type": "string", "enum": sorted(problem_codes())}
    # Beside what the gateway says of an answer stands what the graph returned.
    components["AnswerMetadata"]["additionalProperties"] = True
    by_kind = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in table:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, by_kind, components)
    queries = {endpoint.query.__name__ for endpoint in table if endpoint.query is not None}
    document = {
        "openapi": "3.1.0",
        "info": {
            "title": "Session gateway",
            "version": version,
            "description": "Chat sessions between websites' widgets and LangGraph agents.",
        },
        "paths": paths,
        "components": {
            "schemas": {name: schema for name, schema in components.items() if name not in queries},
            "securitySchemes": {
                "session": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A session's token, where the gateway made the session's id: the `session_token` that "
                    "`POST /api/sessions` answered with",
                },
                "site": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "One of the agent's `site_keys`: for the site's own servers",
                },
                "admin": {"type": "http", "scheme": "bearer", "description": "The admin key"},
            },
        },
    }
    portable: dict[str, Any] = _portable(document)
    return portable


def problem_codes() -> set[str]:
    """The code of every problem that a client can meet."""
    return {problem.code for problem in _subclasses(Problem)}


def _subclasses(problem: type[Problem]) -> Iterator[type[Problem]]:
    yield problem
    for subclass in problem.__subclasses__():
        yield from _subclasses(subclass)


def _portable(part: Any) -> Any:
    r"""Patterns as JSON Schema has them (ECMA-262): `$` is the end of the text there, where Python writes `\Z`."""
    match part:
        case dict():
            return {
                name: value.replace(r"\Z", "$") if name == "pattern" and isinstance(value, str) else _portable(value)
                for name, value in part.items()
            }
        case list():
            return [_portable(value) for value in part]
        case _:
            return part


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _operation(endpoint: Endpoint, by_kind: dict[Any, Any], components: dict[str, Any]) -> dict[str, Any]:
    errors = sorted({*endpoint.errors, *ANY_CALL})
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": re.sub(r"\W+", "_", f"{endpoint.method.lower()}{endpoint.path}").strip("_"),
        "responses": {
            **{str(status): _response(endpoint, status, kind, by_kind) for status, kind in endpoint.answers.items()},
            **{str(status): _problem(status, by_kind) for status in errors if status not in endpoint.answers},
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, **PATH_PARAMETERS[name]}
        for name in re.findall(r"{(\w+)}", endpoint.path)
    ]
    if endpoint.query is not None:
        schema = components[endpoint.query.__name__]
        parameters += [
            {"name": name, "in": "query", "required": name in schema.get("required", []), "schema": field}
            for name, field in schema["properties"].items()
        ]
    headers = (*endpoint.headers, *(("X-User-Token",) if endpoint.guard == "session" else ()))
    parameters += [{"name": name, "in": "header", "required": False, **HEADER_PARAMETERS[name]} for name in headers]
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        content = {media_type: {"schema": by_kind[endpoint.body]} for media_type in endpoint.media_types}
        operation["requestBody"] = {"required": True, "content": content}
    if endpoint.guard == "admin":
        operation["security"] = [{"admin": []}]
    elif endpoint.guard == "session":
        operation["security"] = [{"session": []}, {"site": []}, {}]
    return operation


def _response(endpoint: Endpoint, status: int, kind: Any, by_kind: dict[Any, Any]) -> dict[str, Any]:
    response: dict[str, Any] = {"description": "Done"}
    if _is_struct(kind):
        response["description"] = kind.__doc__ or "Done"
        response["content"] = {"application/json": {"schema": by_kind[kind]}}
    elif kind == EVENT_STREAM:
        response["description"] = "Server-Sent Events, each as described here; comments between them keep the line open"
        response["content"] = {kind: {"schema": EVENT}}
    elif kind is not None:
        response["content"] = {kind: {"schema": {"type": "object" if kind == "application/json" else "string"}}}
    names = endpoint.answer_headers.get(status, ())
    if names:
        response["headers"] = {name: RESPONSE_HEADERS[name] for name in names}
    return response


def _problem(status: int, by_kind: dict[Any, Any]) -> dict[str, Any]:
    codes = sorted(problem.code for problem in _subclasses(Problem) if problem.status == status)
    content = {"application/problem+json": {"schema": by_kind[ProblemDocument]}}
    described = f"{TITLES[status]}: {', '.join(f'`{code}`' for code in codes if code in problem_codes())}"
    response: dict[str, Any] = {"description": described, "content": content}
    if status == 401:
        response["headers"] = {"WWW-Authenticate": RESPONSE_HEADERS["WWW-Authenticate"]}
    elif status in (409, 429, 503):
        response["headers"] = {"Retry-After": RESPONSE_HEADERS["Retry-After"]}
    return response
