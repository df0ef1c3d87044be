"""Joins the endpoints of all API modules into Starlette's routes."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from gateway.api.endpoint import Api, Endpoint, Handler


def endpoints(*apis: Api) -> list[Endpoint]:
    """Every endpoint, in the order of the reference and of the routes."""
    return [endpoint for api in apis for endpoint in api.endpoints()]


def routes(table: Sequence[Endpoint]) -> list[Route]:
    """Starlette's routes: one a path, so that a wrong method gets 405 and a wrong path 404.

    They are tried in the order of the table, messages first: each route that is tried before costs a turn a microsecond.
    Raises ValueError where a path would hide a later one.
    """
    by_path: dict[str, dict[str, Handler]] = {}
    for endpoint in table:
        for earlier in by_path:
            if earlier != endpoint.path and _hides(earlier, endpoint.path):
                raise ValueError(f"{endpoint.path} is listed behind {earlier}, which would answer in its place")
        by_path.setdefault(endpoint.path, {})[endpoint.method] = endpoint.handler
    return [_Path(path, _Resource(handlers), methods=list(handlers)) for path, handlers in by_path.items()]


def _hides(path: str, other: str) -> bool:
    """Whether one path answers for the other too, as `/api/sessions/{session_id}` does for `/api/sessions/stats`."""
    parts, others = path.split("/"), other.split("/")
    return len(parts) == len(others) and all(a == b or a.startswith("{") for a, b in zip(parts, others, strict=True))


class _Path(Route):
    """The only route of its path, whatever the method: a wrong method on `/api/sessions/stats` reaches no session."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return (Match.FULL if match is Match.PARTIAL else match), child


class _Resource:
    """The handlers of a path by method. An ASGI application: Starlette wraps functions in a second exception handler."""

    def __init__(self, handlers: dict[str, Handler]) -> None:
        self._handlers = {"HEAD": handlers["GET"], **handlers} if "GET" in handlers else handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handlers[scope["method"]](Request(scope, receive, send))
        await response(scope, receive, send)
