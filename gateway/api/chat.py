"""`/api/chat`: a visitor's messages."""

from collections.abc import Callable
from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.access.audit import audited
from gateway.access.caller import Caller, UserToken, address_of, kept_address, known_operator
from gateway.access.gatekeeper import Gatekeeper
from gateway.agents import Agents
from gateway.api.answers import answer
from gateway.api.entrance import load_agent
from gateway.api.reading import BodyBounds, check_metadata, check_text, read_body, read_cursor, read_query
from gateway.api.sse import event_stream
from gateway.limits.admission import Admission
from gateway.limits.limiter import Limiter
from gateway.limits.open_streams import OpenStreams
from gateway.problems import AgentInactive, InvalidField, NoTurnRunning, TurnNotFound
from gateway.streams.log import TurnLog
from gateway.streams.streams import Streams
from gateway.turns.in_process import AgentRuntime
from gateway.turns.refusals import existing
from gateway.turns.request import MessageId, SessionId, TurnRequest
from persistence.history import History
from persistence.model.agents import Agent, IfBusy
from persistence.model.ids import as_uuid, masked
from persistence.model.session import Channel
from persistence.redis.turn_logs import TurnLogs


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
    user_token: Annotated[str, UserToken] | None = None


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
    """What a page says of itself. It opens no door: only an Origin does."""

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
        logs: TurnLogs,
        gatekeeper: Gatekeeper,
        limiter: Limiter,
        open_streams: OpenStreams,
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
        self._open_streams = open_streams
        self._bounds = bounds
        self._max_message_chars = max_message_chars
        self._decoder = msgspec.json.Decoder(MessageBody)
        self._cancel_decoder = msgspec.json.Decoder(CancelBody)

    async def message(self, request: Request) -> Response:
        """POST /api/chat/{agent_id}/message"""
        agent, turn, admission = await self._read(request)
        with audited("message_sent", known_operator(request), agent=agent.id, session=masked(turn.session_id)):
            result = await self._runtime.execute(agent, turn, admission)
        return answer(result, headers=admission.headers())

    async def stream(self, request: Request) -> Response:
        """POST /api/chat/{agent_id}/stream"""
        with self._open_streams.enter(address_of(request)) as stream:
            agent, turn, admission = await self._read(request, stream.check)
            with audited("stream_opened", known_operator(request), agent=agent.id, session=masked(turn.session_id)):
                begun = await self._runtime.stream(agent, turn, admission)
                if isinstance(begun, TurnLog):
                    items = self._streams.read(begun)
                else:
                    # The turn is another call's: any number of these may come.
                    stream.check(turn.session_id)
                    items = await self._streams.open_turn(turn.session_id, begun.turn_id, turn.access, None)
            stream.join(turn.session_id)
            return event_stream(items, stream.hand_over(), admission.headers())

    async def resume(self, request: Request) -> Response:
        """GET /api/chat/{agent_id}/turns/{turn_id}/stream"""
        agent, caller = await self._enter(request)
        session_id = read_query(request, StreamQuery).session_id
        access = self._gatekeeper.access(caller, agent, session_id)
        cursor = read_cursor(request)
        turn_id = as_uuid(request.path_params["turn_id"])
        if turn_id is None:
            raise TurnNotFound
        with (
            self._open_streams.enter(address_of(request)) as stream,
            audited("stream_opened", known_operator(request), agent=agent.id, session=masked(session_id)),
        ):
            items = await self._streams.open_turn(session_id, turn_id, access, cursor)
            stream.check(session_id)
            stream.join(session_id)
            return event_stream(items, stream.hand_over())

    async def cancel(self, request: Request) -> Response:
        """POST /api/chat/{agent_id}/cancel"""
        agent, caller = await self._enter(request)
        body = await read_body(request, self._cancel_decoder, self._bounds)
        access = self._gatekeeper.access(caller, agent, body.session_id)
        with audited("turn_cancelled", known_operator(request), agent=agent.id, session=masked(body.session_id)):
            hot = existing(await self._history.find_session(body.session_id, access))
            if not hot.running or await self._logs.cancel(body.session_id, hot.running, access) is not True:
                raise NoTurnRunning
        return answer(CancelAnswer(hot.running), 202)

    async def available(self, request: Request) -> Response:
        """GET /api/chat/{agent_id}: what a widget asks before it shows itself."""
        agent = await load_agent(self._agents, request.path_params["agent_id"], self._limiter, request)
        read_query(request, AvailabilityQuery)
        if not agent.definition.active:
            raise AgentInactive
        self._gatekeeper.require_website(Caller(request), agent)
        # Each page view asks: a browser need not do so more than once in five minutes.
        headers = {"Cache-Control": "private, max-age=300", "Vary": "Origin"}
        return answer(Availability(agent.id, list(agent.definition.channels)), headers=headers)

    async def _enter(self, request: Request) -> tuple[Agent, Caller]:
        """The agent of the path, on a website that may use it, before anything else is read of the request."""
        agent = await load_agent(self._agents, request.path_params["agent_id"], self._limiter, request)
        caller = Caller(request)
        self._gatekeeper.require_origin(caller, agent)
        return agent, caller

    async def _read(
        self, request: Request, check_session: Callable[[str], None] | None = None
    ) -> tuple[Agent, TurnRequest, Admission]:
        """The agent and the message of a request that may be answered, once it has been charged to its limits."""
        agent, caller = await self._enter(request)
        self._limiter.check_address(caller.ip_address)
        body = await read_body(request, self._decoder, self._bounds)
        self._check(body)
        key = _idempotency_key(request)
        if not agent.definition.active:
            raise AgentInactive
        caller.add_body(body.metadata, body.user_token)
        access = self._gatekeeper.access(caller, agent, body.session_id, begins=True)
        turn = TurnRequest(
            session_id=body.session_id,
            message=body.message,
            metadata=body.metadata,
            message_id=body.message_id or key,
            channel=body.channel,
            audio_url=body.audio_url,
            audio_duration_ms=body.audio_duration_ms,
            if_busy=body.if_busy,
            access=access,
            ip_address=kept_address(caller.ip_address, truncate=agent.definition.truncate_ip),
            user_agent=caller.user_agent,
        )
        if check_session is not None:
            check_session(body.session_id)
        await self._limiter.prepare(agent)
        # Nothing behind this can fail before the turn has taken the admission over.
        return agent, turn, self._limiter.admit_turn(agent, caller.ip_address, caller.website_domain)

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
