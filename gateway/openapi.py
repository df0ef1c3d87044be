"""The OpenAPI 3.1 document, made from the route table and the types that it names."""

import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec

from gateway.api.rendering import ProblemDocument
from gateway.api.routes import Endpoint

TITLES = {
    400: "The body is not JSON",
    401: "A token or key is missing or wrong",
    403: "Not allowed",
    404: "There is no such thing",
    409: "Not now, or not twice",
    410: "It is over",
    413: "The body is too large",
    415: "The body is not application/json",
    422: "A field is missing or wrong",
    429: "Too much",
    500: "Something stored cannot be read",
    502: "The agent failed",
    503: "A part of the system is not reachable",
    504: "The agent took too long",
}


def openapi_document(table: Sequence[Endpoint], version: str) -> dict[str, Any]:
    """The document for a route table."""
    kinds = [ProblemDocument]
    for endpoint in table:
        kinds += [kind for kind in (endpoint.body, endpoint.query, *endpoint.answers.values()) if _is_struct(kind)]
    kinds = list(dict.fromkeys(kinds))
    schemas, components = msgspec.json.schema_components(kinds, ref_template="#/components/schemas/{name}")
    by_kind = dict(zip(kinds, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for endpoint in table:
        paths.setdefault(endpoint.path, {})[endpoint.method.lower()] = _operation(endpoint, by_kind, components)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "Session gateway",
            "version": version,
            "description": "Chat sessions between websites' widgets and LangGraph agents.",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                "session": {"type": "http", "scheme": "bearer", "description": "A session's token"},
                "admin": {"type": "http", "scheme": "bearer", "description": "The admin key"},
            },
        },
    }


def _is_struct(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _operation(endpoint: Endpoint, by_kind: dict[Any, Any], components: dict[str, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "summary": endpoint.summary,
        "operationId": re.sub(r"\W+", "_", f"{endpoint.method.lower()}{endpoint.path}").strip("_"),
        "responses": {
            **{str(status): _response(kind, by_kind) for status, kind in endpoint.answers.items()},
            **{str(status): _problem(status, by_kind) for status in endpoint.errors},
        },
    }
    parameters = [
        {"name": name, "in": "path", "required": True, "schema": {"type": "string"}}
        for name in re.findall(r"{(\w+)}", endpoint.path)
    ]
    if endpoint.query is not None:
        schema = components[endpoint.query.__name__]
        parameters += [
            {"name": name, "in": "query", "required": name in schema.get("required", []), "schema": field}
            for name, field in schema["properties"].items()
        ]
    if AsyncIterator in endpoint.answers.values() and endpoint.method == "GET":
        parameters.append({"name": "Last-Event-ID", "in": "header", "required": False, "schema": {"type": "string"}})
    if parameters:
        operation["parameters"] = parameters
    if endpoint.body is not None:
        content = {"application/json": {"schema": by_kind[endpoint.body]}}
        operation["requestBody"] = {"required": True, "content": content}
    if endpoint.guard == "admin":
        operation["security"] = [{"admin": []}]
    elif endpoint.guard == "session":
        operation["security"] = [{"session": []}, {}]
    return operation


def _response(kind: Any, by_kind: dict[Any, Any]) -> dict[str, Any]:
    if kind is None:
        return {"description": "Done"}
    if _is_struct(kind):
        return {"description": kind.__doc__ or "Done", "content": {"application/json": {"schema": by_kind[kind]}}}
    media_type = {str: "text/plain", bytes: "text/javascript"}.get(kind, "text/event-stream")
    return {"description": "Done", "content": {media_type: {"schema": {"type": "string"}}}}


def _problem(status: int, by_kind: dict[Any, Any]) -> dict[str, Any]:
    content = {"application/problem+json": {"schema": by_kind[ProblemDocument]}}
    return {"description": TITLES[status], "content": content}
