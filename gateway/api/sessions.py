"""`/api/sessions`: opening, reading, ending and erasing sessions; lists and totals for operators."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import datetime
from secrets import token_urlsafe
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response
from uuid_utils import uuid7

from gateway.access.audit import audited
from gateway.access.caller import Caller, UserToken, address_of, kept_address, known_operator
from gateway.access.gatekeeper import MINTED, Gatekeeper
from gateway.access.tokens import SessionToken, SessionTokens
from gateway.agents import Agents
from gateway.api.answers import answer
from gateway.api.entrance import load_agent
from gateway.api.reading import BodyBounds, check_metadata, read_body, read_cursor, read_query
from gateway.api.sse import event_stream
from gateway.limits.admission import Outcome
from gateway.limits.limiter import Admission, Limiter
from gateway.limits.open_streams import OpenStreams
from gateway.problems import (
    AgentInactive,
    AgentNotFound,
    ChannelNotAllowed,
    DomainNotAllowed,
    IdentityRequired,
    InvalidField,
    Problem,
    RedisDown,
    SessionErased,
    SessionNotFound,
    TokenRequired,
    UserTokenInvalid,
)
from gateway.streams.follow import Streams
from gateway.turns.refusals import existing, raise_refusal
from gateway.turns.request import SessionId
from persistence.errors import PersistenceError
from persistence.history import OPERATOR, History
from persistence.hydrator import Hydrator
from persistence.model.ids import masked
from persistence.model.session import Access, Channel, NewSession, Role, Session
from persistence.model.times import iso_from
from persistence.postgres.postgres import SessionFilter
from persistence.redis.outcomes import Opened, Refused
from persistence.redis.sessions import SessionStore

OPEN_ATTEMPTS = 5


class OpenBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A session to open. Without `session_id` the gateway mints one, and its token is needed from then on."""

    agent_id: Annotated[str, msgspec.Meta(min_length=1, max_length=100)]
    session_id: SessionId | None = None
    channel: Channel | None = None
    user_token: Annotated[str, UserToken] | None = None
    metadata: dict[str, Any] = {}


class OpenedSession(msgspec.Struct):
    """An open session and the token that goes with it."""

    session_id: str
    session_token: str
    agent_id: str
    channel: str
    status: str
    started_at: str


class SessionAnswer(msgspec.Struct):
    """A session without its messages."""

    session_id: str
    agent_id: str
    channel: str
    status: str
    user_id: str | None
    website_domain: str | None
    started_at: str
    last_activity_at: str
    ended_at: str | None
    message_count: int
    context: dict[str, Any]


class ListedAnswer(SessionAnswer):
    """A session in an operator's list; `live` when it is in Redis."""

    id: str
    ip_address: str | None
    user_agent: str | None
    live: bool


class MessageView(msgspec.Struct, omit_defaults=True):
    """A message of a transcript; `seq` is its number in the session, from 1."""

    id: str
    role: Role
    content: str
    created_at: str
    seq: int
    turn_id: str
    message_id: str | None = None
    audio_url: str | None = None
    audio_duration_ms: int | None = None
    tokens_used: int | None = None
    latency_ms: int | None = None
    model_used: str | None = None


class MessagesAnswer(msgspec.Struct):
    """A page of a transcript, oldest first. `next_before` is the `before` of the page that comes before it."""

    messages: list[MessageView]
    next_before: int | None


class StatisticsAnswer(msgspec.Struct):
    """Totals over an agent's sessions. `exact` is false while very many records wait to be stored."""

    total_sessions: int
    active_sessions: int
    avg_messages_per_session: float
    total_messages: int
    exact: bool


class ListAnswer(msgspec.Struct):
    """Sessions by last activity, newest first; `next_cursor` is null on the last page."""

    sessions: list[ListedAnswer]
    next_cursor: str | None


class MessagesQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which part of a transcript."""

    before: Annotated[int, msgspec.Meta(ge=1, le=2_147_483_647)] | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=200)] = 50


class StatisticsQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Whose sessions: an agent's UUID or name; without it, everybody's."""

    agent_id: str | None = None


class ListQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which sessions."""

    agent_id: str | None = None
    status: str | None = None
    website_domain: str | None = None
    channel: Channel | None = None
    cursor: str | None = None
    limit: Annotated[int, msgspec.Meta(ge=1, le=200)] = 50


class SessionsApi:
    """The routes about sessions."""

    def __init__(
        self,
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
        agent = await load_agent(self._agents, body.agent_id, self._limiter, request)
        definition = agent.definition
        if not definition.active:
            raise AgentInactive
        if body.channel and body.channel not in definition.channels:
            raise ChannelNotAllowed(f"channel: {body.channel}", field="channel")
        caller = Caller(request)
        caller.add_body(body.metadata, body.user_token)
        self._gatekeeper.require_origin(caller, agent)
        if body.session_id is None:
            access = self._gatekeeper.newcomer(caller, agent)
        elif definition.require_token and not caller.token:
            raise TokenRequired("this agent's session ids are minted by the gateway")
        else:
            access = self._gatekeeper.access(caller, agent, body.session_id, begins=True)
        session_id = body.session_id or f"{MINTED}{token_urlsafe(24)}"
        new = NewSession(
            id=str(uuid7()),
            session_id=session_id,
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
        # A token is given out for a session that is there: one that is not has been erased since, and stays so.
        known = body.session_id is not None and (definition.require_token or (access.authorized and not access.trusted))
        admission = self._limiter.admit_open(caller.ip_address)
        outcome: Outcome = "refused"
        try:
            with audited("session_opened", known_operator(request), agent=agent.id, session=masked(session_id)):
                opened = await self._open(new, access, admission, may_create=not known)
            outcome = "ran"
        finally:
            admission.settle(outcome)
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

    async def _open(self, new: NewSession, access: Access, admission: Admission, *, may_create: bool) -> Opened:
        ticket = 0
        for _ in range(OPEN_ATTEMPTS):
            if new.minted or ticket:
                admission.reserve_session()
            outcome = await self._store.open(new, ticket=ticket, authorized=access.authorized, trusted=access.trusted)
            if isinstance(outcome, Opened):
                admission.session_created(outcome.created)
                return outcome
            if isinstance(outcome, Refused):
                raise_refusal(outcome)
            ticket = outcome.ticket
            if await self._hydrator.hydrate(new.session_id, ticket):
                ticket = 0
            elif not may_create:
                raise SessionNotFound
        raise RedisDown("the session left Redis again and again", retry_after_s=1)

    async def show(self, request: Request) -> Response:
        """GET /api/sessions/{session_id}"""
        session_id = _session_id(request)
        access = await self._access(request, session_id)
        with audited("session_shown", known_operator(request), session=masked(session_id)) as facts:
            session = existing(await self._history.find_session(session_id, access)).session
            facts["id"] = session.id
        return answer(_view(session))

    async def messages(self, request: Request) -> Response:
        """GET /api/sessions/{session_id}/messages"""
        query = read_query(request, MessagesQuery)
        session_id = _session_id(request)
        access = await self._access(request, session_id)
        with audited("transcript_shown", known_operator(request), session=masked(session_id)) as facts:
            page = existing(await self._history.find_messages(session_id, access, query.before, query.limit))
            facts["messages"] = len(page.messages)
        views = [msgspec.convert(message, MessageView, from_attributes=True) for message in page.messages]
        return answer(MessagesAnswer(views, page.next_before))

    async def events(self, request: Request) -> Response:
        """GET /api/sessions/{session_id}/events"""
        session_id = _session_id(request)
        with self._open_streams.enter(address_of(request)) as stream:
            access = await self._access(request, session_id)
            with audited("session_followed", known_operator(request), session=masked(session_id)):
                events = await self._streams.open_feed(session_id, access, read_cursor(request))
            stream.check(session_id)
            stream.join(session_id)
            return event_stream(events, stream.hand_over())

    async def end(self, request: Request) -> Response:
        """POST /api/sessions/{session_id}/end"""
        session_id = _session_id(request)
        access = await self._access(request, session_id)
        with audited("session_ended", known_operator(request), session=masked(session_id)) as facts:
            ended: Session | Refused | None = await self._hydrator.with_session(
                session_id, lambda: self._store.end(session_id, access)
            )
            session = existing(ended)
            facts["id"] = session.id
        return answer(_view(session))

    async def erase(self, request: Request) -> Response:
        """DELETE /api/sessions/{session_id}"""
        session_id = _session_id(request)
        access = await self._access(request, session_id)
        with audited("session_erased", known_operator(request), session=masked(session_id)) as facts:
            erased = await self._hydrator.with_session(session_id, lambda: self._store.erase(session_id, access))
            facts["id"] = existing(erased)
        return Response(status_code=204)

    async def _access(self, request: Request, session_id: str) -> Access:
        """The caller's access to a session. Its agent, which the path does not name, is asked of the session itself.

        Whatever does not let a visitor in is told as if there were no such session.
        """
        caller = Caller(request)
        self._limiter.check_misses(caller.ip_address)
        found = agent = None
        failed: Exception = SessionNotFound()
        try:
            found = existing(await self._history.find_session(session_id, OPERATOR))
            agent = await self._agents.load(found.session.agent_id)
        except (Problem, PersistenceError) as error:
            # An operator may erase what is damaged.
            failed = error
        # A site's key is no guess at the admin's.
        site = self._gatekeeper.is_site(caller, agent) if agent else self._gatekeeper.is_some_site(caller)
        if not site and self._gatekeeper.operator(request) is not None:
            return OPERATOR
        if isinstance(failed, SessionErased):
            # Nothing is left of it but where it was: who was not there is told what everybody is who asks for none.
            return Access("", caller.website_domain)
        if found is None or agent is None:
            absent = isinstance(failed, (SessionNotFound, AgentNotFound))
            if absent:
                self._limiter.charge_miss(caller.ip_address)
            if not site:
                self._gatekeeper.refuse_absent(caller, session_id)
            if absent:
                raise SessionNotFound from failed
            raise failed
        try:
            return self._gatekeeper.access(caller, agent, session_id)
        except (DomainNotAllowed, IdentityRequired) as problem:
            raise SessionNotFound from problem
        except UserTokenInvalid as problem:
            session = found.session
            elsewhere = caller.website_domain not in ("", session.website_domain)
            if elsewhere or session.user_id not in ("", problem.expired_user):
                raise SessionNotFound from problem
            # It gives nothing away: the session is nobody's, or the token was once its user's.
            raise

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
            )
        )

    async def list(self, request: Request) -> Response:
        """GET /api/sessions"""
        operator = self._gatekeeper.require_admin(request)
        query = read_query(request, ListQuery)
        agent = await self._agents.load(query.agent_id) if query.agent_id else None
        which = SessionFilter(agent.id if agent else None, query.status, query.website_domain, query.channel)
        with audited("sessions_listed", operator, agent=which.agent_id) as facts:
            listed = await self._history.list_sessions(which, _decode_cursor(query.cursor), query.limit + 1)
            facts["sessions"] = min(len(listed), query.limit)
        more, listed = len(listed) > query.limit, listed[: query.limit]
        views = [
            ListedAnswer(
                **msgspec.structs.asdict(_view(one.session)),
                id=one.session.id,
                ip_address=one.session.ip_address or None,
                user_agent=one.session.user_agent or None,
                live=one.live,
            )
            for one in listed
        ]
        return answer(ListAnswer(views, _encode_cursor(listed[-1].position) if more else None))


def _session_id(request: Request) -> str:
    session_id: str = request.path_params["session_id"]
    try:
        return msgspec.convert(session_id, SessionId)
    except msgspec.ValidationError as error:
        # No session can have such an id.
        raise SessionNotFound from error


def _view(session: Session) -> SessionAnswer:
    return SessionAnswer(
        session_id=session.session_id,
        agent_id=session.agent_id,
        channel=session.channel,
        status=session.status,
        user_id=session.user_id or None,
        website_domain=session.website_domain or None,
        started_at=session.started_at,
        last_activity_at=session.last_activity_at,
        ended_at=session.ended_at or None,
        message_count=session.message_count,
        context=session.context,
    )


def _encode_cursor(position: tuple[str, str]) -> str:
    return urlsafe_b64encode("\n".join(position).encode()).decode().rstrip("=")


def _decode_cursor(cursor: str | None) -> tuple[str, str] | None:
    if cursor is None:
        return None
    try:
        activity, session_id = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode().split("\n")
        # As it was encoded, and nothing that merely resembles it.
        if iso_from(datetime.fromisoformat(activity)) != activity or activity < "2000":
            raise ValueError(activity)
        msgspec.convert(session_id, SessionId)
    except (ValueError, OverflowError) as error:
        raise InvalidField("cursor: not one of this server's", field="cursor") from error
    return activity, session_id
