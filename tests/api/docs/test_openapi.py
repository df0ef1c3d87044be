"""The OpenAPI document: whole in itself, and true of what is served."""

import re
from typing import Any

import httpx
import pytest
from starlette.routing import Route

from gateway.access.admin_key import FAILURES
from gateway.app import Pod
from tests.conftest import PutAgent
from tests.support.serving import ADMIN
from tests.support.visiting import new_session_id

METHODS = {"get", "put", "patch", "post", "delete"}
ITSELF = "/openapi.json"


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    answer = await client.get(ITSELF)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/json")
    found: dict[str, Any] = answer.json()
    return found


def operations(document: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Every operation as method, path and what is said of it."""
    return [
        (method.upper(), path, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
        if method in METHODS
    ]


def references(part: Any) -> list[str]:
    """Every $ref, wherever it stands."""
    match part:
        case dict():
            own = [part["$ref"]] if "$ref" in part else []
            return own + [found for value in part.values() for found in references(value)]
        case list():
            return [found for value in part for found in references(value)]
        case _:
            return []


def resolve(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """What a schema that is a $ref refers to."""
    found: Any = schema
    while "$ref" in found:
        where = found["$ref"].removeprefix("#/").split("/")
        found = document
        for name in where:
            found = found[name]
    assert isinstance(found, dict)
    return found


async def test_the_document_has_the_parts_that_openapi_3_1_asks_for(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    assert document["info"]["title"]
    assert document["info"]["version"]
    for method, path, operation in operations(document):
        assert operation["summary"], (method, path)
        assert operation["responses"], (method, path)
        assert operation["tags"][0] in {tag["name"] for tag in document["tags"]}, (method, path)
        for status, referred in operation["responses"].items():
            response = resolve(document, referred)
            assert re.fullmatch(r"[1-5]\d\d", status), (method, path)
            assert response["description"], (method, path, status)
            for content in response.get("content", {}).values():
                assert content["schema"], (method, path, status)
    assert all(set(item) <= METHODS for item in document["paths"].values())


async def test_operation_ids_are_unique(document: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, _, operation in operations(document)]
    assert len(set(ids)) == len(ids)


async def test_every_reference_leads_somewhere(document: dict[str, Any]) -> None:
    found = set(references(document))
    assert found
    for reference in found:
        assert re.match("#/components/(schemas|responses)/", reference)
        assert resolve(document, {"$ref": reference})


async def test_every_schema_and_response_is_used(document: dict[str, Any]) -> None:
    used = set(references(document))
    for kind in ("schemas", "responses"):
        names = {f"#/components/{kind}/{name}" for name in document["components"][kind]}
        assert names == {reference for reference in used if reference.startswith(f"#/components/{kind}/")}


def fields(part: Any, where: str = "") -> list[tuple[str, dict[str, Any]]]:
    """Every field of every schema, wherever it stands, with its path."""
    match part:
        case dict():
            own = part.get("properties")
            found = [(f"{where}.{name}", field) for name, field in own.items()] if isinstance(own, dict) else []
            return found + [one for name, value in part.items() for one in fields(value, f"{where}.{name}")]
        case list():
            return [one for index, value in enumerate(part) for one in fields(value, f"{where}.{index}")]
        case _:
            return []


def without_sentence(document: dict[str, Any]) -> list[str]:
    """Fields, schemas and parameters that are not described."""
    parameters = [
        (f"{method} {path}: {parameter['name']}", parameter)
        for method, path, operation in operations(document)
        for parameter in operation.get("parameters", [])
    ]
    schemas = document["components"]["schemas"].items()
    named = [*fields(document["components"]), *fields(document["paths"]), *parameters, *schemas]
    return [where for where, described in named if len(described.get("description", "").split()) < 2]


async def test_every_field_has_its_sentence(document: dict[str, Any]) -> None:
    assert len(fields(document["components"])) > 100
    assert without_sentence(document) == []


async def test_a_field_without_a_sentence_is_found(document: dict[str, Any]) -> None:
    """Control of the test before."""
    parameter = document["paths"]["/api/sessions"]["get"]["parameters"][0]
    del document["components"]["schemas"]["RateLimit"]["properties"]["per_s"]["description"], parameter["description"]
    assert without_sentence(document) == [".schemas.RateLimit.per_s", f"GET /api/sessions: {parameter['name']}"]


async def test_every_parameter_of_a_path_is_described_and_no_other(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        parameters = operation.get("parameters", [])
        described = [parameter["name"] for parameter in parameters if parameter["in"] == "path"]
        assert described == re.findall(r"{(\w+)}", path), (method, path)
        assert all(parameter["required"] for parameter in parameters if parameter["in"] == "path")
        names = [(parameter["in"], parameter["name"]) for parameter in parameters]
        assert len(set(names)) == len(names), (method, path)


async def test_every_route_is_described_and_nothing_else_is(pod: Pod, document: dict[str, Any]) -> None:
    served = {
        (method, route.path)
        for route in pod.app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert served == {(method, path) for method, path, _ in operations(document)}


async def test_every_error_is_a_problem_document(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        for status, referred in operation["responses"].items():
            response = resolve(document, referred)
            if int(status) < 400 or (path, status) == ("/readyz", "503"):
                continue
            assert list(response["content"]) == ["application/problem+json"], (method, path, status)
            schema = resolve(document, response["content"]["application/problem+json"]["schema"])
            assert {"type", "title", "status", "code", "detail", "request_id"} <= set(schema["required"])
            assert {"retryable", "retry_after", "field"} <= set(schema["properties"])
            for code, example in response["content"]["application/problem+json"]["examples"].items():
                assert (str(example["value"]["status"]), example["value"]["code"]) == (status, code), (method, path)
                assert set(schema["required"]) <= example["value"].keys() <= set(schema["properties"]), code


async def test_the_calls_that_need_a_key_or_a_token_say_so(document: dict[str, Any]) -> None:
    schemes = document["components"]["securitySchemes"]
    for method, path, operation in operations(document):
        security = operation.get("security", [])
        assert all(name in schemes for requirement in security for name in requirement)
        admin = path in ("/api/sessions/stats", "/api/agents", "/api/agents/{agent_id}") or (
            (method, path) == ("GET", "/api/sessions")
        )
        assert (security == [{"admin": []}]) is admin, (method, path)
        assert ("401" in operation["responses"]) is bool(security), (method, path)


async def test_the_calls_of_visitors_say_how_a_user_is_known(document: dict[str, Any]) -> None:
    for method, path, operation in operations(document):
        headers = {one["name"] for one in operation.get("parameters", []) if one["in"] == "header"}
        of_visitors = operation.get("security") == [{"session": []}, {"site": []}, {}]
        assert ("X-User-Token" in headers) is of_visitors, (method, path)


async def test_every_call_says_that_it_may_be_shut_out_for_guessing(
    client: httpx.AsyncClient, put_agent: PutAgent, document: dict[str, Any]
) -> None:
    """A key that is neither a site's nor an operator's is a guess, wherever it comes along."""
    await put_agent("shop", allowed_domains=("shop.example",))
    values = {"agent_id": "shop", "session_id": new_session_id(), "turn_id": "0196b6a2-0000-7000-8000-000000000000"}
    guess = {"Authorization": "Bearer no key at all", "Origin": "https://evil.example"}
    for _ in range(FAILURES):
        await client.get("/api/agents", headers=guess)
    for method, path, operation in operations(document):
        if path.startswith("/api/"):
            body = {"agent_id": "shop"} if path == "/api/sessions" else None
            answer = await client.request(method, path.format(**values), json=body, headers=guess)
            assert answer.status_code == 429, (method, path, answer.text)
            assert "429" in operation["responses"], (method, path)


async def test_every_call_answers_as_it_is_described(
    client: httpx.AsyncClient, put_agent: PutAgent, document: dict[str, Any]
) -> None:
    """Each call, good and bad: its status is described, and its JSON has the fields of the schema."""
    await put_agent("shop")
    session_id, unknown = new_session_id(), new_session_id()
    message = {"message": "Hello", "session_id": session_id}
    calls: list[tuple[str, str, dict[str, str], Any]] = [
        ("POST", "/api/chat/{agent_id}/message", {"agent_id": "shop"}, message),
        ("POST", "/api/chat/{agent_id}/message", {"agent_id": "shop"}, message | {"channel": "fax"}),
        ("POST", "/api/chat/{agent_id}/message", {"agent_id": "nobody"}, message),
        ("POST", "/api/chat/{agent_id}/message", {"agent_id": "a%00b"}, message),
        ("POST", "/api/sessions", {}, {"agent_id": "shop"}),
        ("POST", "/api/sessions", {}, {"agent_id": "shop", "session_id": session_id}),
        ("POST", "/api/sessions", {}, {"agent_id": "nobody"}),
        ("GET", "/api/sessions", {}, None),
        ("GET", "/api/sessions?limit=0", {}, None),
        ("GET", "/api/sessions/stats", {}, None),
        ("GET", "/api/sessions/stats?agent_id=nobody", {}, None),
        ("GET", "/api/sessions/stats?agent_id=a%00b", {}, None),
        ("GET", "/api/sessions/{session_id}", {"session_id": session_id}, None),
        ("GET", "/api/sessions/{session_id}", {"session_id": unknown}, None),
        ("GET", "/api/sessions/{session_id}/messages", {"session_id": session_id}, None),
        ("GET", "/api/sessions/{session_id}/messages?limit=0", {"session_id": session_id}, None),
        ("GET", "/api/sessions/{session_id}/messages", {"session_id": unknown}, None),
        ("POST", "/api/sessions/{session_id}/end", {"session_id": session_id}, None),
        ("POST", "/api/chat/{agent_id}/message", {"agent_id": "shop"}, message),
        ("POST", "/api/sessions/{session_id}/end", {"session_id": unknown}, None),
        ("DELETE", "/api/sessions/{session_id}", {"session_id": session_id}, None),
        ("POST", "/api/chat/{agent_id}/message", {"agent_id": "shop"}, message),
        ("POST", "/api/sessions", {}, {"agent_id": "shop", "session_id": session_id}),
        ("DELETE", "/api/sessions/{session_id}", {"session_id": unknown}, None),
        ("GET", "/api/agents", {}, None),
        ("PUT", "/api/agents/{agent_id}", {"agent_id": "new"}, {"graph": "echo"}),
        ("PUT", "/api/agents/{agent_id}", {"agent_id": "new"}, {"graph": "echo", "rate_limit": None}),
        ("PUT", "/api/agents/{agent_id}", {"agent_id": "new"}, {"graph": "nothing"}),
        ("PATCH", "/api/agents/{agent_id}", {"agent_id": "new"}, {"history_window": 4}),
        ("PATCH", "/api/agents/{agent_id}", {"agent_id": "new"}, {"graph": None}),
        ("PATCH", "/api/agents/{agent_id}", {"agent_id": "nobody"}, {"history_window": 4}),
        ("GET", "/api/agents/{agent_id}", {"agent_id": "new"}, None),
        ("GET", "/api/agents/{agent_id}", {"agent_id": "a%00b"}, None),
        ("DELETE", "/api/agents/{agent_id}", {"agent_id": "new"}, None),
        ("DELETE", "/api/agents/{agent_id}", {"agent_id": "new"}, None),
        ("DELETE", "/api/agents/{agent_id}", {"agent_id": "a%00b"}, None),
        ("GET", "/healthz", {}, None),
        ("GET", "/readyz", {}, None),
        ("GET", "/metrics", {}, None),
        ("GET", ITSELF, {}, None),
        ("GET", "/docs", {}, None),
        ("GET", "/widget.js", {}, None),
        ("GET", "/widget/{version}/{file}", {"version": "older", "file": "panel.js"}, None),
        ("GET", "/widget/{version}/{file}", {"version": "older", "file": "nothing.js"}, None),
        ("GET", "/widget/{version}/{folder}/{file}", {"version": "older", "folder": "texts", "file": "de.js"}, None),
        ("GET", "/widget/{version}/{folder}/{file}", {"version": "older", "folder": "texts", "file": "nothing.js"}, None),
        ("GET", "/api/chat/{agent_id}", {"agent_id": "shop"}, None),
        ("GET", "/api/chat/{agent_id}", {"agent_id": "nobody"}, None),
    ]
    wrong = []
    for method, path, values, body in calls:
        admin = ADMIN if method == "GET" or "agents" in path else {}
        answer = await client.request(method, path.format(**values), json=body, headers=admin)
        responses = document["paths"][path.partition("?")[0]][method.lower()]["responses"]
        described = responses.get(str(answer.status_code))
        described = described and resolve(document, described)
        where = f"{method} {path} {values}: {answer.status_code}"
        if described is None:
            wrong.append(f"{where} is not described: {answer.text}")
        elif content := described.get("content"):
            media_type = answer.headers["content-type"].partition(";")[0]
            assert media_type in content, where
            if media_type.startswith("text/") or path == ITSELF:
                continue
            schema = resolve(document, content[media_type]["schema"])
            assert set(schema["required"]) <= answer.json().keys() <= set(schema["properties"]), where
        else:
            assert answer.content == b"", where
    assert wrong == []
