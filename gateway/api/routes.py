"""Joins the endpoints of all API modules into Starlette's routes."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from gateway.api.endpoint import Api, Endpoint, Handler


def endpoints(*apis: Api) -> list[Endpoint]:
    """Every endpoint, in the order of the reference."""
    return [endpoint for api in apis for endpoint in api.endpoints()]


def routes(table: Sequence[Endpoint]) -> list[Route]:
    """Starlette's routes: one a path, so that a wrong method gets 405 and a wrong path 404."""
    by_path: dict[str, dict[str, Handler]] = {}
    for endpoint in sorted(table, key=_generality):
        by_path.setdefault(endpoint.path, {})[endpoint.method] = endpoint.handler
    return [_Path(path, _Resource(handlers), methods=list(handlers)) for path, handlers in by_path.items()]


def _generality(endpoint: Endpoint) -> list[bool]:
    """Sorts `/api/sessions/stats` before `/api/sessions/{session_id}`: Starlette takes the first route that matches."""
    return [part.startswith("{") for part in endpoint.path.split("/")]


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
