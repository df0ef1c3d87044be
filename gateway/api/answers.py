"""Answers and problems as responses."""

from typing import Any

import msgspec
import structlog
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from gateway.access.caller import request_id
from gateway.logs import frames
from gateway.problems import BodyTooLarge, MethodNotAllowed, NotFound, Problem, encode_problem, problem_headers, problem_of
from persistence.errors import PersistenceError

_encoder = msgspec.json.Encoder()

log = structlog.get_logger()


def answer(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """A value as a JSON response."""
    return Response(_encoder.encode(value), status, headers, "application/json")


def problem_response(problem: Problem, request: Request) -> Response:
    """A problem as the response to a request, whose id it names."""
    body = encode_problem(problem, request_id(request))
    return Response(body, problem.status, problem_headers(problem), "application/problem+json")


async def on_problem(request: Request, error: Exception) -> Response:
    """Exception handler of Problem."""
    assert isinstance(error, Problem)
    return problem_response(error, request)


async def on_persistence_error(request: Request, error: Exception) -> Response:
    """Exception handler of PersistenceError. Its text stays in the log."""
    assert isinstance(error, PersistenceError)
    log.warning("request.failed", error=f"{type(error).__name__}: {error}", request_id=request_id(request))
    return problem_response(problem_of(error), request)


async def on_http_exception(request: Request, error: Exception) -> Response:
    """Exception handler of Starlette's own errors, such as 404 and 405."""
    assert isinstance(error, HTTPException)
    known: dict[int, type[Problem]] = {404: NotFound, 405: MethodNotAllowed, 413: BodyTooLarge}
    problem = known.get(error.status_code, Problem)()
    problem.status = error.status_code
    response = problem_response(problem, request)
    if error.headers:
        response.headers.update(error.headers)
    return response


async def on_unexpected(request: Request, error: Exception) -> Response:
    """Exception handler of everything else: a defect. Its type and place are logged, its text is not."""
    if not hasattr(request.state, "crashed"):
        # Logged once: the CORS middleware calls this handler too, before Starlette does.
        request.state.crashed = True
        log.error("request.crashed", error=type(error).__name__, frames=frames(error), request_id=request_id(request))
    return problem_response(Problem(), request)
