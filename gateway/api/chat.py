"""`/api/chat`: a visitor's messages."""

from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.agents import Agents
from gateway.api.callers import Caller, Gatekeeper
from gateway.api.rendering import (
    BodyBounds,
    answer,
    check_metadata,
    check_text,
    event_stream,
    read_body,
    read_cursor,
    read_query,
)
from gateway.limits import AddressLimiter
from gateway.problems import AgentInactive, InvalidField, NoTurnRunning, TurnNotFound
from gateway.runtime import AgentRuntime
from gateway.streams import Streams, TurnLog, render
from gateway.turns import MessageId, SessionId, TurnRequest, existing
from persistence.agents import Agent, as_uuid
from persistence.events import EventLogs
from persistence.history import History
from persistence.records import Channel
from persistence.sessions import Access, IfBusy


class MessageBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A visitor's message. `message_id` makes a retry safe; `if_busy` overrides the agent's own setting."""

    message: Annotated[str, msgspec.Meta(min_length=1)]
    session_id: SessionId
    metadata: dict[str, Any] = {}
    message_id: MessageId | None = None
    channel: Channel | None = None
    audio_url: Annotated[str, msgspec.Meta(max_length=2048)] | None = None
    audio_duration_ms: Annotated[int, msgspec.Meta(ge=0, le=2_147_483_647)] | None = None
    if_busy: IfBusy | None = None


class AnswerMetadata(msgspec.Struct):
    """What the graph returned, and beside it what the gateway adds (these fields)."""

    session_id: str
    turn_id: str
    message_count: int
    latency_ms: int
    replayed: bool


class MessageAnswer(msgspec.Struct):
    """The agent's answer."""

    response: str
    metadata: AnswerMetadata


class StreamQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Whose turn."""

    session_id: SessionId


class CancelBody(msgspec.Struct, forbid_unknown_fields=True):
    """Whose turn is to be cancelled."""

    session_id: SessionId


class CancelAnswer(msgspec.Struct):
    """The turn that was cancelled."""

    turn_id: str


class AvailabilityQuery(msgspec.Struct, forbid_unknown_fields=True):
    """The website that asks, for requests without an Origin header: those from the gateway's own pages."""

    website_domain: Annotated[str, msgspec.Meta(max_length=255)] = ""


class Availability(msgspec.Struct):
    """The agent answers on this website."""

    agent_id: str
    channels: list[Channel]


class ChatApi:
    """Answers messages. `max_message_chars` bounds a message."""

    def __init__(
        self,
        agents: Agents,
        runtime: AgentRuntime,
        streams: Streams,
        history: History,
        logs: EventLogs,
        gatekeeper: Gatekeeper,
        limiter: AddressLimiter | None,
        *,
        bounds: BodyBounds,
        max_message_chars: int,
    ) -> None:
        self._agents = agents
        self._runtime = runtime
        self._streams = streams
        self._history = history
        self._logs = logs
        self._gatekeeper = gatekeeper
        self._limiter = limiter
        self._bounds = bounds
        self._max_message_chars = max_message_chars
        self._decoder = msgspec.json.Decoder(MessageBody)
        self._cancel_decoder = msgspec.json.Decoder(CancelBody)

    async def message(self, request: Request) -> Response:
        """POST /api/chat/{agent_id}/message"""
        agent, turn = await self._read(request)
        return answer(await self._runtime.execute(agent, turn))

    async def stream(self, request: Request) -> Response:
        """POST /api/chat/{agent_id}/stream"""
        agent, turn = await self._read(request)
        begun = await self._runtime.stream(agent, turn)
        if isinstance(begun, TurnLog):
            return event_stream(render(begun, None))
        access = Access(agent.id, turn.website_domain, turn.authorized)
        return event_stream(await self._streams.open_turn(turn.session_id, begun.turn_id, access, None))

    async def resume(self, request: Request) -> Response:
        """GET /api/chat/{agent_id}/turns/{turn_id}/stream"""
        session_id = read_query(request, StreamQuery).session_id
        access = await self._access(request, session_id)
        cursor = read_cursor(request)
        turn_id = as_uuid(request.path_params["turn_id"])
        if turn_id is None:
            raise TurnNotFound
        return event_stream(await self._streams.open_turn(session_id, turn_id, access, cursor))

    async def cancel(self, request: Request) -> Response:
        """POST /api/chat/{agent_id}/cancel"""
        body = await read_body(request, self._cancel_decoder, self._bounds)
        access = await self._access(request, body.session_id)
        hot = existing(await self._history.find_session(body.session_id, access))
        if not hot.running or await self._logs.cancel(body.session_id, hot.running, access) is not True:
            raise NoTurnRunning
        return answer(CancelAnswer(hot.running), 202)

    async def available(self, request: Request) -> Response:
        """GET /api/chat/{agent_id}: what a widget asks before it shows itself."""
        query = read_query(request, AvailabilityQuery)
        agent = await self._agents.load(request.path_params["agent_id"])
        if not agent.definition.active:
            raise AgentInactive
        self._gatekeeper.require_domain(Caller(request, {"website_domain": query.website_domain}), agent)
        # Each page view asks: a browser need not do so more than once in five minutes.
        headers = {"Cache-Control": "private, max-age=300", "Vary": "Origin"}
        return answer(Availability(agent.id, list(agent.definition.channels)), headers=headers)

    async def _access(self, request: Request, session_id: str) -> Access:
        agent = await self._agents.load(request.path_params["agent_id"])
        caller = Caller(request)
        return Access(agent.id, caller.website_domain, self._gatekeeper.authorized(caller, session_id, agent.id))

    async def _read(self, request: Request) -> tuple[Agent, TurnRequest]:
        """The agent and the message of a request that may be answered."""
        body = await read_body(request, self._decoder, self._bounds)
        self._check(body)
        key = _idempotency_key(request)
        agent = await self._agents.load(request.path_params["agent_id"])
        if not agent.definition.active:
            raise AgentInactive
        caller = Caller(request, body.metadata)
        self._gatekeeper.require_domain(caller, agent)
        authorized = self._gatekeeper.authorized(caller, body.session_id, agent.id)
        if self._limiter is not None:
            self._limiter.admit(caller.ip_address)
        return agent, TurnRequest(
            session_id=body.session_id,
            message=body.message,
            metadata=body.metadata,
            message_id=body.message_id or key,
            channel=body.channel,
            audio_url=body.audio_url,
            audio_duration_ms=body.audio_duration_ms,
            if_busy=body.if_busy,
            website_domain=caller.website_domain,
            authorized=authorized,
            ip_address=caller.ip_address,
            user_agent=caller.user_agent,
        )

    def _check(self, body: MessageBody) -> None:
        if len(body.message) > self._max_message_chars:
            raise InvalidField(f"message: longer than {self._max_message_chars} characters", field="message")
        check_text(body.message, "message")
        check_metadata(body.metadata, self._bounds)
        check_text(body.audio_url, "audio_url")


def _idempotency_key(request: Request) -> str:
    """The Idempotency-Key header, bare or quoted, which stands for a message_id in the body."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return ""
    try:
        return msgspec.convert(key[1:-1] if len(key) > 2 and key[0] == key[-1] == '"' else key, MessageId)
    except msgspec.ValidationError as error:
        raise InvalidField("Idempotency-Key: 1 to 128 of A-Z a-z 0-9 _ . : -", field="Idempotency-Key") from error
