"""Routes are tried in the order of the table, so a general path must not stand before a particular one."""

import pytest
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.endpoint import Endpoint
from gateway.api.routes import routes


async def answer(request: Request) -> Response:
    return Response()


def table(*paths: str) -> list[Endpoint]:
    return [Endpoint("GET", path, answer, "", {200: None}) for path in paths]


def test_a_path_that_another_would_answer_for_stops_the_start() -> None:
    with pytest.raises(ValueError, match="/api/sessions/stats is listed behind /api/sessions/"):
        routes(table("/api/sessions", "/api/sessions/{session_id}", "/api/sessions/stats"))


def test_other_orders_are_kept() -> None:
    paths = ["/a/{id}/message", "/a/stats", "/a/{id}", "/a", "/b/{id}", "/b/{id}/{part}"]
    assert [route.path for route in routes(table(*paths))] == paths
