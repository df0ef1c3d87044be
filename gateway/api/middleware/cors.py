"""CORS (WHATWG Fetch, section 3.3): which website's pages may read an answer.

Not what keeps strangers out: each call is checked against its Origin itself, and no cookie is ever read or set, hence no
credentials. An answer of an agent is for the websites that may use it; a problem that says so, and what belongs to no
agent, is for the page that asked.
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
"""The longest that browsers keep the answer to a preflight (Chromium); what it allows is checked again by each call."""

_CALLED_BY_PAGES = re.compile(r"/api/(?:chat/(?P<agent>[^/]+)(?P<call>/.*)?|sessions(?:/.*)?)")


class Cors:
    """ASGI middleware: answers preflights, and says on every other answer who may read it."""

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
        # Of a call that asks whether a website may use the agent every website reads the answer: the widget there says in
        # the console why there is no chat.
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
                # The handler has just looked the agent up. If it could not, there is nothing in the answer but the problem.
                if self._is_readable(origin, self._agents.known(reference) if reference else None):
                    answered["Access-Control-Allow-Origin"] = origin
                    answered["Access-Control-Expose-Headers"] = EXPOSED
            await send(message)

        try:
            await self._app(scope, receive, send_readable)
        except Exception as error:
            # What nobody foresaw is rendered outside of this middleware; a page could not read it there.
            if not started:
                await (await on_unexpected(Request(scope), error))(scope, receive, send_readable)
            raise

    async def _preflight(self, origin: str, reference: str | None, scope: Scope, receive: Receive, send: Send) -> None:
        agent = None
        if reference is not None:
            try:
                agent = await self._agents.load(reference)
            except (Problem, PersistenceError):
                # The call itself says it, and may be read.
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
        """Whether a page from there may read what is answered about an agent, or about none that is known."""
        where = read_origin(origin)
        if where.domain == NOWHERE and origin != NOWHERE:
            return False
        return agent is None or self._gatekeeper.domains(agent).allow(where)


def _vary(headers: MutableHeaders) -> None:
    """Another Origin may get another answer: no cache may give it this one."""
    known = headers.get("vary")
    if known is None or "origin" not in known.lower():
        headers["Vary"] = f"{known}, Origin" if known else "Origin"
