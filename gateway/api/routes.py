"""The route table: what the server serves, and what its OpenAPI document says. One list, so that they cannot drift."""

from collections.abc import Sequence

from starlette.requests import Request
from starlette.routing import Match, Route
from starlette.types import Receive, Scope, Send

from gateway.api.agents import AgentAnswer, AgentBody, AgentList, AgentPatch, AgentsApi
from gateway.api.chat import (
    Availability,
    AvailabilityQuery,
    CancelAnswer,
    CancelBody,
    ChatApi,
    MessageAnswer,
    MessageBody,
    StreamQuery,
)
from gateway.api.docs.routes import ReferenceApi
from gateway.api.endpoint import EVENT_STREAM, SCRIPT, Endpoint, Handler
from gateway.api.ops import Alive, OpsApi, Readiness
from gateway.api.reading import JSON, MERGE_PATCH
from gateway.api.sessions import (
    ListAnswer,
    ListQuery,
    MessagesAnswer,
    MessagesQuery,
    OpenBody,
    OpenedSession,
    SessionAnswer,
    SessionsApi,
    StatisticsAnswer,
    StatisticsQuery,
)
from gateway.api.widget import WidgetApi


def endpoints(
    chat: ChatApi, sessions: SessionsApi, agents: AgentsApi, ops: OpsApi, widget: WidgetApi, reference: ReferenceApi
) -> list[Endpoint]:
    """Every endpoint, the more particular path before the more general."""
    body = (400, 408, 413, 415, 422)
    session = (401, 403, 404, 429, 500, 503)
    admin = (401, 403, 429, 503)
    return [
        Endpoint(
            "POST",
            "/api/chat/{agent_id}/message",
            chat.message,
            "Answer a visitor's message",
            {200: MessageAnswer},
            (*body, 401, 403, 404, 409, 410, 429, 500, 502, 503, 504),
            body=MessageBody,
            headers=("Idempotency-Key",),
            guard="session",
        ),
        Endpoint(
            "POST",
            "/api/chat/{agent_id}/stream",
            chat.stream,
            "Answer a visitor's message as a stream of events",
            {200: EVENT_STREAM},
            (*body, 401, 403, 404, 409, 410, 429, 500, 502, 503, 504),
            body=MessageBody,
            headers=("Idempotency-Key",),
            guard="session",
        ),
        Endpoint(
            "GET",
            "/api/chat/{agent_id}/turns/{turn_id}/stream",
            chat.resume,
            "Go on with the stream of a turn, behind Last-Event-ID",
            {200: EVENT_STREAM},
            (*session, 422),
            query=StreamQuery,
            headers=("Last-Event-ID",),
            guard="session",
        ),
        Endpoint(
            "POST",
            "/api/chat/{agent_id}/cancel",
            chat.cancel,
            "Cancel the answer that is being made",
            {202: CancelAnswer},
            (*body, *session, 403, 409),
            body=CancelBody,
            guard="session",
        ),
        Endpoint(
            "GET",
            "/api/chat/{agent_id}",
            chat.available,
            "Whether a website may use an agent",
            {200: Availability},
            (403, 404, 422, 429, 503),
            query=AvailabilityQuery,
        ),
        Endpoint(
            "GET",
            "/api/sessions/{session_id}/events",
            sessions.events,
            "Watch a session's turns as they happen",
            {200: EVENT_STREAM},
            (*session, 422),
            headers=("Last-Event-ID",),
            guard="session",
        ),
        Endpoint(
            "POST",
            "/api/sessions",
            sessions.open,
            "Open a session, or find it",
            {201: OpenedSession, 200: OpenedSession},
            (*body, *session, 410),
            body=OpenBody,
            guard="session",
        ),
        Endpoint(
            "GET",
            "/api/sessions/stats",
            sessions.statistics,
            "Totals over sessions",
            {200: StatisticsAnswer},
            (*admin, 404, 422),
            query=StatisticsQuery,
            guard="admin",
        ),
        Endpoint(
            "GET",
            "/api/sessions",
            sessions.list,
            "List live and stored sessions",
            {200: ListAnswer},
            (*admin, 404, 422),
            query=ListQuery,
            guard="admin",
        ),
        Endpoint(
            "GET",
            "/api/sessions/{session_id}",
            sessions.show,
            "Show a session without its messages",
            {200: SessionAnswer},
            session,
            guard="session",
        ),
        Endpoint(
            "GET",
            "/api/sessions/{session_id}/messages",
            sessions.messages,
            "Show a page of a session's transcript",
            {200: MessagesAnswer},
            (*session, 422),
            query=MessagesQuery,
            guard="session",
        ),
        Endpoint(
            "POST",
            "/api/sessions/{session_id}/end",
            sessions.end,
            "End a session for good",
            {200: SessionAnswer},
            session,
            guard="session",
        ),
        Endpoint(
            "DELETE",
            "/api/sessions/{session_id}",
            sessions.erase,
            "Erase a session everywhere",
            {204: None},
            session,
            guard="session",
        ),
        Endpoint("GET", "/api/agents", agents.list, "List agents", {200: AgentList}, admin, guard="admin"),
        Endpoint(
            "GET",
            "/api/agents/{agent_id}",
            agents.show,
            "Show an agent",
            {200: AgentAnswer},
            (*admin, 404),
            guard="admin",
        ),
        Endpoint(
            "PUT",
            "/api/agents/{agent_id}",
            agents.put,
            "Create an agent, or replace its definition",
            {201: AgentAnswer, 200: AgentAnswer},
            (*body, *admin, 404, 409),
            body=AgentBody,
            guard="admin",
        ),
        Endpoint(
            "PATCH",
            "/api/agents/{agent_id}",
            agents.patch,
            "Change the fields of an agent that are named",
            {200: AgentAnswer},
            (*body, *admin, 404),
            body=AgentPatch,
            media_types=(JSON, MERGE_PATCH),
            guard="admin",
        ),
        Endpoint(
            "DELETE",
            "/api/agents/{agent_id}",
            agents.delete,
            "Delete an agent",
            {204: None},
            (*admin, 404),
            guard="admin",
        ),
        Endpoint("GET", "/healthz", ops.alive, "Whether the process answers", {200: Alive}),
        Endpoint("GET", "/readyz", ops.ready, "Whether the pod can serve", {200: Readiness, 503: Readiness}),
        Endpoint("GET", "/metrics", ops.metrics, "Prometheus metrics", {200: "text/plain"}, (503,)),
        Endpoint("GET", "/openapi.json", reference.document, "This description", {200: "application/json"}),
        Endpoint("GET", "/docs", reference.page, "This description, to be read", {200: "text/html"}),
        Endpoint(
            "GET",
            "/widget.js",
            widget.entry,
            "The chat widget",
            {200: SCRIPT, 304: None},
            headers=("If-None-Match",),
            answer_headers={200: ("ETag", "Cache-Control"), 304: ("ETag", "Cache-Control")},
        ),
        Endpoint(
            "GET",
            "/widget/{version}/{file}",
            widget.part,
            "A module of the chat widget, which never changes",
            {200: SCRIPT, 304: None, 307: None},
            (404,),
            headers=("If-None-Match",),
            answer_headers={200: ("ETag", "Cache-Control"), 304: ("ETag", "Cache-Control"), 307: ("Location",)},
        ),
        Endpoint(
            "GET",
            "/widget/{version}/{folder}/{file}",
            widget.part,
            "A module of the chat widget in a folder, such as a language; it never changes",
            {200: SCRIPT, 304: None, 307: None},
            (404,),
            headers=("If-None-Match",),
            answer_headers={200: ("ETag", "Cache-Control"), 304: ("ETag", "Cache-Control"), 307: ("Location",)},
        ),
    ]


class _Path(Route):
    """A route that is the only one for its path, whatever the method: `/api/sessions/stats` is no session's."""

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        match, child = super().matches(scope)
        return (Match.FULL if match is Match.PARTIAL else match), child


def routes(table: Sequence[Endpoint]) -> list[Route]:
    """Starlette's routes for the table: one per path, so that a wrong method is told from a wrong path."""
    by_path: dict[str, dict[str, Handler]] = {}
    for endpoint in table:
        by_path.setdefault(endpoint.path, {})[endpoint.method] = endpoint.handler
    return [_Path(path, _Resource(handlers), methods=list(handlers)) for path, handlers in by_path.items()]


class _Resource:
    """What answers at a path, by method. An ASGI application: around a function Starlette would handle exceptions twice."""

    def __init__(self, handlers: dict[str, Handler]) -> None:
        self._handlers = {"HEAD": handlers["GET"], **handlers} if "GET" in handlers else handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._handlers[scope["method"]](Request(scope, receive, send))
        await response(scope, receive, send)
