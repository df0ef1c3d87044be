"""CORS (WHATWG Fetch, section 3.3): which website's pages may read an answer.

This is not the access check: each handler checks the Origin itself. There are no cookies, hence no credentials. An agent's
answers can be read by its allowed websites; a problem about that, and what belongs to no agent, by the page that asked.
"""

import re

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gateway.access.domains import NOWHERE, read_origin
from gateway.access.gatekeeper import Gatekeeper
from gateway.agents import Agents
from gateway.api.answers import on_unexpected, problem_response
from gateway.problems import DomainNotAllowed, Problem
from persistence.errors import PersistenceError
from persistence.model.agents import Agent

METHODS = "GET, POST, DELETE"
REQUEST_HEADERS = "Authorization, Content-Type, Idempotency-Key, Last-Event-ID, X-User-Token"
EXPOSED = "Retry-After, RateLimit, RateLimit-Policy"
MAX_AGE_S = 7200
"""Chromium keeps answers to preflights no longer. Each call is checked again, so a long time does no harm."""

_CALLED_BY_PAGES = re.compile(r"/api/(?:chat/(?P<agent>[^/]+)(?P<call>/.*)?|sessions(?:/.*)?)")


class Cors:
    """ASGI middleware: answers preflights, and sets the CORS headers of every other answer."""

    def __init__(self, app: ASGIApp, agents: Agents, gatekeeper: Gatekeeper) -> None:
        self._app = app
        self._agents = agents
        self._gatekeeper = gatekeeper

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        found = _CALLED_BY_PAGES.fullmatch(scope["path"]) if scope["type"] == "http" else None
        if found is None:
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origins = headers.getlist("origin")
        origin = origins[0] if len(origins) == 1 else ""
        # Every website may read whether it may use the agent: the widget says in the console why there is no chat.
        reference = found["agent"] if found["call"] else None
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await self._preflight(origin, reference, scope, receive, send)
            return
        started = False

        async def send_readable(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                answered = MutableHeaders(scope=message)
                _vary(answered)
                # The handler has just loaded the agent. If that failed, the answer is only the problem.
                if self._is_readable(origin, self._agents.known(reference) if reference else None):
                    answered["Access-Control-Allow-Origin"] = origin
                    answered["Access-Control-Expose-Headers"] = EXPOSED
            await send(message)

        try:
            await self._app(scope, receive, send_readable)
        except Exception as error:
            # Starlette renders defects outside of this middleware, without the headers that let a page read them.
            if not started:
                await (await on_unexpected(Request(scope), error))(scope, receive, send_readable)
            raise

    async def _preflight(self, origin: str, reference: str | None, scope: Scope, receive: Receive, send: Send) -> None:
        agent = None
        if reference is not None:
            try:
                agent = await self._agents.load(reference)
            except (Problem, PersistenceError):
                # The page may read the problem in the answer to the call itself.
                agent = None
        if self._is_readable(origin, agent):
            allowed = {
                "Access-Control-Allow-Origin": origin,
                "Access-Control-Allow-Methods": METHODS,
                "Access-Control-Allow-Headers": REQUEST_HEADERS,
                "Access-Control-Max-Age": str(MAX_AGE_S),
            }
            response = Response(status_code=204, headers=allowed)
        else:
            response = problem_response(DomainNotAllowed(f"website domain: {read_origin(origin).domain}"), Request(scope))
        _vary(response.headers)
        await response(scope, receive, send)

    def _is_readable(self, origin: str, agent: Agent | None) -> bool:
        """Whether a page of that origin may read answers about the agent; without one, about no known agent."""
        where = read_origin(origin)
        if where.domain == NOWHERE and origin != NOWHERE:
            return False
        return agent is None or self._gatekeeper.domains(agent).allow(where)


def _vary(headers: MutableHeaders) -> None:
    """Tells caches that the answer depends on the Origin."""
    known = headers.get("vary")
    if known is None or "origin" not in known.lower():
        headers["Vary"] = f"{known}, Origin" if known else "Origin"
