"""The problem answers of the reference: one a status, with every code that it may carry and an example of each."""

from collections.abc import Iterator
from typing import Any

import msgspec

from gateway.api.docs.examples import STORY
from gateway.api.docs.parameters import RESPONSE_HEADERS
from gateway.problems import Problem, encode_problem

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
MEDIA_TYPE = "application/problem+json"
REQUEST_ID = "0196b6a5-3c07-7a98-8e12-6d4b90f1a2c3"
RETRIED = (409, 429, 503)
"""Statuses with a Retry-After, where the gateway knows one."""


def problem_codes() -> set[str]:
    """The code of every problem that a client can meet."""
    return {problem.code for problem in _problems()}


def problem_responses(schema: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The OpenAPI responses by name; `schema` is the problem document's."""
    return {name_of(status): _response(status, schema) for status in TITLES}


def name_of(status: int) -> str:
    """The name of a status' response among the document's components."""
    return f"Problem{status}"


def _problems() -> list[type[Problem]]:
    return list(_subclasses(Problem))


def _subclasses(problem: type[Problem]) -> Iterator[type[Problem]]:
    yield problem
    for subclass in problem.__subclasses__():
        yield from _subclasses(subclass)


def _response(status: int, schema: dict[str, Any]) -> dict[str, Any]:
    found = sorted((problem for problem in _problems() if problem.status == status), key=lambda problem: problem.code)
    examples = {problem.code: {"summary": problem.title, "value": _example(problem)} for problem in found}
    response: dict[str, Any] = {
        "description": f"{TITLES[status]}: {', '.join(f'`{code}`' for code in examples)}",
        "content": {MEDIA_TYPE: {"schema": schema, "examples": examples}},
    }
    headers = ("WWW-Authenticate",) if status == 401 else ("Retry-After",) if status in RETRIED else ()
    if headers:
        response["headers"] = {name: RESPONSE_HEADERS[name] for name in headers}
    return response


def _example(problem: type[Problem]) -> Any:
    """One that the story really gets, or else the problem without particulars."""
    for example in STORY:
        if isinstance(example.answer, dict) and example.answer.get("code") == problem.code:
            return example.answer
    retry_after_s = 1 if problem.retryable and problem.status in RETRIED else None
    return msgspec.json.decode(encode_problem(problem(retry_after_s=retry_after_s), REQUEST_ID))
