"""`/api/sessions`: opening, reading, ending and erasing sessions; lists and totals for operators."""

from collections.abc import Sequence
from secrets import token_urlsafe

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from uuid_utils import uuid7

from gateway.access.audit import audited
from gateway.access.caller import Caller, address_of, kept_address, known_operator
from gateway.access.gatekeeper import MINTED, Gatekeeper
from gateway.access.tokens import SessionToken, SessionTokens
from gateway.agents import Agents
from gateway.api.answers import answer
from gateway.api.endpoint import ADMIN_ERRORS, BODY_ERRORS, EVENT_STREAM, LIMIT_HEADERS, SESSION_ERRORS, Endpoint
from gateway.api.entrance import Entrance
from gateway.api.reading import BodyBounds, check_metadata, read_body, read_cursor, read_query
from gateway.api.session_types import (
    ListAnswer,
    ListQuery,
    MessagesAnswer,
    MessagesQuery,
    MessageView,
    OpenBody,
    OpenedSession,
    SessionAnswer,
    StatisticsAnswer,
    StatisticsQuery,
    decode_cursor,
    encode_cursor,
    listed_view,
    view,
)
from gateway.api.sse import event_stream
from gateway.limits.admission import Admission, Outcome
from gateway.limits.limiter import Limiter
from gateway.limits.open_streams import OpenStreams
from gateway.problems import AgentInactive, ChannelNotAllowed, SessionNotFound, TokenRequired
from gateway.streams.streams import Streams
from gateway.turns.refusals import existing, raise_refusal
from gateway.turns.request import SessionId
from persistence.history import History
from persistence.hydrator import Hydrator
from persistence.model.agents import Agent
from persistence.model.ids import masked
from persistence.model.session import Access, NewSession, Session
from persistence.postgres.postgres import SessionFilter
from persistence.redis.outcomes import Absent, Opened, Refused
from persistence.redis.sessions import SessionStore


class SessionsApi:
    """The calls about sessions."""

    def __init__(
        self,
        entrance: Entrance,
        agents: Agents,
        store: SessionStore,
        hydrator: Hydrator,
        history: History,
        streams: Streams,
        gatekeeper: Gatekeeper,
        tokens: SessionTokens,
        limiter: Limiter,
        open_streams: OpenStreams,
        *,
        bounds: BodyBounds,
    ) -> None:
        self._entrance = entrance
        self._agents = agents
        self._store = store
        self._hydrator = hydrator
        self._history = history
        self._streams = streams
        self._gatekeeper = gatekeeper
        self._tokens = tokens
        self._limiter = limiter
        self._open_streams = open_streams
        self._bounds = bounds
        self._decoder = msgspec.json.Decoder(OpenBody)

    async def open(self, request: Request) -> Response:
        """POST /api/sessions"""
        self._limiter.check_address(address_of(request))
        body = await read_body(request, self._decoder, self._bounds)
        check_metadata(body.metadata, self._bounds)
        agent = await self._entrance.load_agent(body.agent_id, request)
        self._check_open(body, agent)
        caller = Caller(request)
        caller.add_body(body.metadata, body.user_token)
        self._gatekeeper.require_origin(caller, agent)
        access = self._access_to_open(caller, agent, body)
        new = _new_session(body, agent, caller, access)
        # Only an existing session gets a token here. If it is gone, it was erased since, and must not come back.
        known = not new.minted and (agent.definition.require_token or (access.authorized and not access.trusted))
        admission = self._limiter.admit_open(caller.ip_address)
        outcome: Outcome = "refused"
        try:
            with audited("session_opened", known_operator(request), agent=agent.id, session=masked(new.session_id)):
                opened = await self._open(new, access, admission, may_create=not known)
            outcome = "ran"
        finally:
            admission.close(outcome)
        session = opened.session
        token = SessionToken(session.session_id, agent.id, session.website_domain, session.user_id)
        return answer(
            OpenedSession(
                session_id=session.session_id,
                session_token=self._tokens.mint(token),
                agent_id=session.agent_id,
                channel=session.channel,
                status=session.status,
                started_at=session.started_at,
            ),
            201 if opened.created else 200,
            admission.headers(),
        )

    def _check_open(self, body: OpenBody, agent: Agent) -> None:
        if not agent.definition.active:
            raise AgentInactive
        if body.channel and body.channel not in agent.definition.channels:
            raise ChannelNotAllowed(f"channel: {body.channel}", field="channel")

    def _access_to_open(self, caller: Caller, agent: Agent, body: OpenBody) -> Access:
        if body.session_id is None:
            return self._gatekeeper.newcomer(caller, agent)
        if agent.definition.require_token and not caller.token:
            raise TokenRequired("this agent's session ids are minted by the gateway")
        return self._gatekeeper.access(caller, agent, body.session_id, begins=True)

    async def _open(self, new: NewSession, access: Access, admission: Admission, *, may_create: bool) -> Opened:
        """The session `new` describes: found in either store, or created. Raises SessionNotFound when it may not be created,
        and the Problem of a refusal."""
        unused_ticket = 0

        async def allow_creation(ticket: int) -> None:
            nonlocal unused_ticket
            unused_ticket = ticket

        async def open_once() -> Opened | Absent | Refused:
            nonlocal unused_ticket
            ticket, unused_ticket = unused_ticket, 0
            if new.minted or ticket:
                admission.reserve_session()
            return await self._store.open(new, ticket=ticket, authorized=access.authorized, trusted=access.trusted)

        # Opening creates the session itself once it has a ticket, so that it knows whether it did.
        opened: Opened | Refused | None = await self._hydrator.with_session(
            new.session_id, open_once, allow_creation if may_create else None
        )
        if opened is None:
            raise SessionNotFound
        if isinstance(opened, Refused):
            raise_refusal(opened)
        admission.session_created(opened.created)
        return opened

    async def show(self, request: Request) -> Response:
        """GET /api/sessions/{session_id}"""
        session_id = _session_id(request)
        access = await self._entrance.access(request, session_id)
        with audited("session_shown", known_operator(request), session=masked(session_id)) as facts:
            session = existing(await self._history.find_session(session_id, access)).session
            facts["id"] = session.id
        return answer(view(session))

    async def messages(self, request: Request) -> Response:
        """GET /api/sessions/{session_id}/messages"""
        query = read_query(request, MessagesQuery)
        session_id = _session_id(request)
        access = await self._entrance.access(request, session_id)
        with audited("transcript_shown", known_operator(request), session=masked(session_id)) as facts:
            page = existing(await self._history.find_messages(session_id, access, query.before, query.limit))
            facts["messages"] = len(page.messages)
        views = [msgspec.convert(message, MessageView, from_attributes=True) for message in page.messages]
        return answer(MessagesAnswer(views, page.next_before))

    async def events(self, request: Request) -> Response:
        """GET /api/sessions/{session_id}/events"""
        session_id = _session_id(request)
        with self._open_streams.enter(address_of(request)) as stream:
            access = await self._entrance.access(request, session_id)
            with audited("session_followed", known_operator(request), session=masked(session_id)):
                items = await self._streams.open_feed(session_id, access, read_cursor(request))
            stream.check(session_id)
            stream.join(session_id)
            return event_stream(items, stream.hand_over())

    async def end(self, request: Request) -> Response:
        """POST /api/sessions/{session_id}/end"""
        session_id = _session_id(request)
        access = await self._entrance.access(request, session_id)
        with audited("session_ended", known_operator(request), session=masked(session_id)) as facts:
            ended: Session | Refused | None = await self._hydrator.with_session(
                session_id, lambda: self._store.end(session_id, access)
            )
            session = existing(ended)
            facts["id"] = session.id
        return answer(view(session))

    async def erase(self, request: Request) -> Response:
        """DELETE /api/sessions/{session_id}"""
        session_id = _session_id(request)
        access = await self._entrance.access(request, session_id)
        with audited("session_erased", known_operator(request), session=masked(session_id)) as facts:
            erased = await self._hydrator.with_session(session_id, lambda: self._store.erase(session_id, access))
            facts["id"] = existing(erased)
        return Response(status_code=204)

    async def statistics(self, request: Request) -> Response:
        """GET /api/sessions/stats"""
        operator = self._gatekeeper.require_admin(request)
        query = read_query(request, StatisticsQuery)
        agent = await self._agents.load(query.agent_id) if query.agent_id else None
        with audited("statistics_shown", operator, agent=agent.id if agent else None):
            totals = await self._history.load_statistics(agent.id if agent else None)
        average = totals.messages / totals.total_sessions if totals.total_sessions else 0.0
        return answer(
            StatisticsAnswer(
                total_sessions=totals.total_sessions,
                active_sessions=totals.active_sessions,
                avg_messages_per_session=round(average, 2),
                total_messages=totals.messages,
                exact=totals.exact,
                partial=totals.partial,
            )
        )

    async def list(self, request: Request) -> Response:
        """GET /api/sessions"""
        operator = self._gatekeeper.require_admin(request)
        query = read_query(request, ListQuery)
        agent = await self._agents.load(query.agent_id) if query.agent_id else None
        which = SessionFilter(agent.id if agent else None, query.status, query.website_domain, query.channel)
        with audited("sessions_listed", operator, agent=which.agent_id) as facts:
            page = await self._history.list_sessions(which, decode_cursor(query.cursor), query.limit + 1)
            facts |= {"sessions": min(len(page.sessions), query.limit), "partial": page.partial}
        listed = page.sessions
        more, listed = len(listed) > query.limit, listed[: query.limit]
        views = [listed_view(one) for one in listed]
        return answer(ListAnswer(views, encode_cursor(listed[-1].position) if more else None, page.partial))

    def endpoints(self) -> Sequence[Endpoint]:
        """The calls about sessions."""
        return [
            Endpoint(
                "POST",
                "/api/sessions",
                self.open,
                "Open a session, or find it",
                {201: OpenedSession, 200: OpenedSession},
                (*BODY_ERRORS, *SESSION_ERRORS, 410),
                description=(
                    "Answers with a token for the session: 201 when it is new, 200 when it was there. An id of the client's "
                    "own needs no opening, for a message opens its session by itself; a minted one (`gs_…`) is good only "
                    "with its token, which nobody can guess."
                ),
                body=OpenBody,
                answer_headers={201: LIMIT_HEADERS, 200: LIMIT_HEADERS},
                guard="session",
            ),
            Endpoint(
                "GET",
                "/api/sessions/stats",
                self.statistics,
                "Totals over sessions",
                {200: StatisticsAnswer},
                (*ADMIN_ERRORS, 404, 422),
                query=StatisticsQuery,
                guard="admin",
            ),
            Endpoint(
                "GET",
                "/api/sessions/{session_id}",
                self.show,
                "Show a session without its messages",
                {200: SessionAnswer},
                SESSION_ERRORS,
                guard="session",
            ),
            Endpoint(
                "GET",
                "/api/sessions/{session_id}/messages",
                self.messages,
                "Show a page of a session's transcript",
                {200: MessagesAnswer},
                (*SESSION_ERRORS, 422),
                description="The newest messages, or those before a number; live and stored ones without a seam.",
                query=MessagesQuery,
                guard="session",
            ),
            Endpoint(
                "GET",
                "/api/sessions/{session_id}/events",
                self.events,
                "Watch a session's turns as they happen",
                {200: EVENT_STREAM},
                (*SESSION_ERRORS, 422),
                description=(
                    "For the visitor's second tab or another device. The stream shows every turn from now on, or from "
                    "behind `Last-Event-ID`, and does not end by itself; after `log.reset`, read the transcript again."
                ),
                headers=("Last-Event-ID",),
                guard="session",
            ),
            Endpoint(
                "POST",
                "/api/sessions/{session_id}/end",
                self.end,
                "End a session for good",
                {200: SessionAnswer},
                SESSION_ERRORS,
                description=(
                    "Its transcript stays readable; a message to it gets 410 `session_ended`. Repeating the call is "
                    "harmless."
                ),
                guard="session",
            ),
            Endpoint(
                "DELETE",
                "/api/sessions/{session_id}",
                self.erase,
                "Erase a session everywhere",
                {204: None},
                SESSION_ERRORS,
                description=(
                    "In Redis at once, in Postgres as soon as the worker gets to it. Its id can never be used again."
                ),
                guard="session",
            ),
            Endpoint(
                "GET",
                "/api/sessions",
                self.list,
                "List live and stored sessions",
                {200: ListAnswer},
                (*ADMIN_ERRORS, 404, 422),
                query=ListQuery,
                guard="admin",
            ),
        ]


def _session_id(request: Request) -> str:
    session_id: str = request.path_params["session_id"]
    try:
        return msgspec.convert(session_id, SessionId)
    except msgspec.ValidationError as error:
        # No session can have such an id.
        raise SessionNotFound from error


def _new_session(body: OpenBody, agent: Agent, caller: Caller, access: Access) -> NewSession:
    definition = agent.definition
    return NewSession(
        id=str(uuid7()),
        session_id=body.session_id or f"{MINTED}{token_urlsafe(24)}",
        agent_id=agent.id,
        channel=body.channel or definition.channels[0],
        website_domain=caller.website_domain,
        user_id=access.user_id,
        ip_address=kept_address(caller.ip_address, truncate=definition.truncate_ip),
        user_agent=caller.user_agent,
        metadata=body.metadata,
        minted=body.session_id is None,
        hot_ttl_s=definition.hot_ttl_s,
    )
