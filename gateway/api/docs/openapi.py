"""The OpenAPI 3.1 document, made from the endpoints, their types, the problems, the events and the examples."""

import re
from collections.abc import Sequence
from typing import Any

import msgspec

from gateway.api.docs.example import Example, curl, event_text, is_stream
from gateway.api.docs.examples import STORY
from gateway.api.docs.parameters import HEADER_PARAMETERS, PATH_PARAMETERS, RESPONSE_HEADERS
from gateway.api.docs.problem_responses import name_of, problem_codes, problem_responses
from gateway.api.endpoint import EVENT_STREAM, Endpoint
from gateway.problems import ProblemDocument
from gateway.streams.events import KINDS, Event

ANY_CALL = (400, 408, 414, 431, 500)
"""Problem statuses of every call: unreadable, slow or oversized HTTP, and defects."""

TAGS = {
    r"/api/chat\b": ("Messages", "What a visitor says and what the agent answers, whole or as a stream of events."),
    r"/api/sessions\b": (
        "Sessions",
        "Conversations: opened, read, watched, ended and erased; lists and totals for operators.",
    ),
    r"/api/agents\b": ("Agents", "What operators set of the agents that answer."),
    r"/(healthz|readyz|metrics)$": ("Operation", "For balancers and monitors. They need no key: do not publish them."),
    r"/": ("Pages", "What browsers load: the chat widget, and this reference."),
}
"""Subjects by the path of their calls, the first that matches."""

SECURITY_SCHEMES = {
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
    "admin": {"type": "http", "scheme": "bearer", "description": "The admin key, over TLS or from the machine itself"},
}
DESCRIPTION = (
    "Chat sessions between websites' widgets and LangGraph agents. Bodies and answers are JSON in UTF-8; unknown fields are "
    "refused in bodies, and may be added to answers. Times are ISO 8601 in UTC, with milliseconds."
)


def openapi_document(table: Sequence[Endpoint], version: str) -> dict[str, Any]:
    """The document for the endpoints."""
    kinds: list[Any] = [ProblemDocument, *(event.data_type() for event in KINDS.values())]
    for endpoint in table:
        kinds += [kind for kind in (endpoint.body, endpoint.query, *endpoint.answers.values()) if _is_struct(kind)]
    kinds = list(dict.fromkeys(kinds))
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    by_kind = dict(zip(kinds, schemas, strict=True))
    components["ProblemDocument"]["properties"]["code"]["enum"] = sorted(problem_codes())
    # Beside the gateway's fields it has those that the graph returned.
    components["AnswerMetadata"]["additionalProperties"] = True
    components["Event"] = _events(by_kind)
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in table:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, by_kind, components)
    queries = {endpoint.query.__name__ for endpoint in table if endpoint.query is not None}
    document = {
        "openapi": "3.1.0",
        "info": {"title": "Session gateway", "version": version, "description": DESCRIPTION},
        "tags": [{"name": name, "description": description} for name, description in TAGS.values()],
        "paths": paths,
        "components": {
            "schemas": {name: schema for name, schema in components.items() if name not in queries},
            "responses": problem_responses(by_kind[ProblemDocument]),
            "securitySchemes": SECURITY_SCHEMES,
        },
    }
    portable: dict[str, Any] = _portable(document)
    return portable


def _portable(part: Any) -> Any:
    r"""Patterns as JSON Schema has them (ECMA-262): `$` ends the text there, where Python writes `\Z`."""
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


def _events(by_kind: dict[Any, Any]) -> dict[str, Any]:
    """The schema of an event of a stream: one of the kinds."""
    ends = " or ".join(f"`{event.kind}`" for event in KINDS.values() if event.terminal)
    return {
        "title": "Event",
        "description": f"An event of a stream. The stream of a turn ends with exactly one event of the kinds {ends}.",
        "oneOf": [_event(event, by_kind[event.data_type()]) for event in KINDS.values()],
    }


def _event(event: type[Event], data: dict[str, Any]) -> dict[str, Any]:
    example = {"id": "3-1", "event": event.kind, "data": msgspec.json.encode(event.example).decode()}
    return {
        "title": event.kind,
        "description": event.__doc__,
        "type": "object",
        "properties": {
            "id": {
                "type": "string",
                "pattern": "^[0-9]+-[0-9]+$",
                "description": "The event's cursor: sent as `Last-Event-ID`, the stream goes on behind it",
            },
            "event": {"const": event.kind, "description": "The kind"},
            "data": {
                "type": "string",
                "description": "A JSON object, on one line",
                "contentMediaType": "application/json",
                "contentSchema": data,
            },
        },
        "required": ["id", "event", "data"],
        "examples": [example],
    }


def _operation(endpoint: Endpoint, by_kind: dict[Any, Any], components: dict[str, Any]) -> dict[str, Any]:
    examples = [example for example in STORY if example.call == f"{endpoint.method} {endpoint.path}"]
    errors = sorted({*endpoint.errors, *ANY_CALL} - endpoint.answers.keys())
    operation: dict[str, Any] = {
        "tags": [next(name for pattern, (name, _) in TAGS.items() if re.match(pattern, endpoint.path))],
        "summary": endpoint.summary,
        "operationId": re.sub(r"\W+", "_", f"{endpoint.method.lower()}{endpoint.path}").strip("_"),
        "responses": {
            **{str(status): _response(endpoint, status, by_kind, examples) for status in endpoint.answers},
            **{str(status): {"$ref": f"#/components/responses/{name_of(status)}"} for status in errors},
        },
        "x-codeSamples": [_sample(example) for example in examples],
    }
    if endpoint.description:
        operation["description"] = endpoint.description
    parameters = _parameters(endpoint, components, [example for example in examples if example.status < 400])
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        content = {"schema": by_kind[endpoint.body], "examples": _bodies(examples)}
        operation["requestBody"] = {"required": True, "content": dict.fromkeys(endpoint.media_types, content)}
    if endpoint.guard == "admin":
        operation["security"] = [{"admin": []}]
    elif endpoint.guard == "session":
        operation["security"] = [{"session": []}, {"site": []}, {}]
    return operation


def _parameters(endpoint: Endpoint, components: dict[str, Any], examples: Sequence[Example]) -> list[dict[str, Any]]:
    parameters: list[dict[str, Any]] = [
        {"name": name, "in": "path", "required": True, **PATH_PARAMETERS[name]}
        for name in re.findall(r"{(\w+)}", endpoint.path)
    ]
    if endpoint.query is not None:
        schema = components[endpoint.query.__name__]
        for name, field in schema["properties"].items():
            # Null where the type has it: `?channel=null` is read as if the parameter were left out.
            bare = {word: value for word, value in field.items() if word != "description"}
            described = {"description": field["description"], "schema": bare}
            parameters.append({"name": name, "in": "query", "required": name in schema.get("required", []), **described})
    headers = (*endpoint.headers, *(("X-User-Token",) if endpoint.guard == "session" else ()))
    parameters += [{"name": name, "in": "header", "required": False, **HEADER_PARAMETERS[name]} for name in headers]
    for parameter in parameters:
        for example in examples:
            given = {**example.path, **example.query, **example.headers}
            if parameter["name"] in given:
                parameter["example"] = given[parameter["name"]]
    return parameters


def _bodies(examples: Sequence[Example]) -> dict[str, Any]:
    """The bodies that are taken, by the name of their example."""
    return {
        _name(example): {"summary": example.summary, "value": example.body} for example in examples if example.status < 400
    }


def _name(example: Example) -> str:
    return re.sub(r"\W+", "_", example.summary.lower()).strip("_")


def _sample(example: Example) -> dict[str, Any]:
    """An example as reference viewers show it (`x-codeSamples`), and its answer beside it."""
    answer = {"x-answer": _answer(example)} if example.answer is not None else {}
    return {"lang": "Shell", "label": example.summary, "source": curl(example), "x-status": example.status, **answer}


def _answer(example: Example) -> Any:
    return event_text(example.answer) if is_stream(example.answer) else example.answer


def _response(endpoint: Endpoint, status: int, by_kind: dict[Any, Any], examples: Sequence[Example]) -> dict[str, Any]:
    kind = endpoint.answers[status]
    response: dict[str, Any] = {"description": "Done"}
    if _is_struct(kind):
        response["description"] = kind.__doc__ or "Done"
        response["content"] = {"application/json": {"schema": by_kind[kind]}}
    elif kind == EVENT_STREAM:
        response["description"] = "Server-Sent Events; comments between them keep the connection open"
        response["content"] = {kind: {"schema": {"$ref": "#/components/schemas/Event"}}}
    elif kind is not None:
        response["content"] = {kind: {"schema": {"type": "object" if kind == "application/json" else "string"}}}
    for content in response.get("content", {}).values():
        content["examples"] = {
            _name(example): {"summary": example.summary, "value": _answer(example)}
            for example in examples
            if example.status == status
        }
    names = endpoint.answer_headers.get(status, ())
    if names:
        response["headers"] = {name: RESPONSE_HEADERS[name] for name in names}
    return response
