"""`/api/chat`: a visitor's messages."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from gateway.access.audit import audited
from gateway.access.caller import Caller, UserToken, address_of, kept_address, known_operator
from gateway.access.gatekeeper import Gatekeeper
from gateway.api.answers import answer
from gateway.api.endpoint import BODY_ERRORS, EVENT_STREAM, LIMIT_HEADERS, SESSION_ERRORS, Endpoint
from gateway.api.entrance import Entrance
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
    """A visitor's message."""

    message: Annotated[str, Meta(min_length=1, description="What the visitor says, at most `GATEWAY_MAX_MESSAGE_CHARS`")]
    session_id: Annotated[
        SessionId, Meta(description="The session, a minted id or one of the client's own making; opened if it is not there")
    ]
    metadata: Annotated[
        dict[str, Any],
        Meta(
            description="Facts about the message, for the graph. `website_domain` and `user_agent` count where the headers "
            "`Origin` and `User-Agent` are missing"
        ),
    ] = {}
    message_id: Annotated[
        MessageId | None,
        Meta(description="Makes a retry safe: a message with the same one gets the stored answer and runs nothing"),
    ] = None
    channel: Annotated[Channel | None, Meta(description="How the visitor talks; the session's channel when left out")] = None
    audio_url: Annotated[
        Annotated[str, Meta(max_length=2048)] | None, Meta(description="Of a spoken message: where its recording is")
    ] = None
    audio_duration_ms: Annotated[
        Annotated[int, Meta(ge=0, le=2_147_483_647)] | None,
        Meta(description="Of a spoken message: its length in milliseconds"),
    ] = None
    if_busy: Annotated[
        IfBusy | None,
        Meta(
            description="While another message of the session is answered: wait (`queue`), be refused (`reject`), or cancel "
            "that answer (`interrupt`). Overrides the agent's own setting"
        ),
    ] = None
    user_token: Annotated[
        Annotated[str, UserToken] | None, Meta(description="A JWT with which the agent's site says who its visitor is")
    ] = None


class AnswerMetadata(msgspec.Struct):
    """What the graph returned as `metadata`, and beside it these fields of the gateway."""

    session_id: Annotated[str, Meta(description="The session's id")]
    turn_id: Annotated[str, Meta(description="The turn's UUID")]
    message_count: Annotated[int, Meta(description="Messages of the session up to this answer")]
    latency_ms: Annotated[int, Meta(description="How long the turn took, in milliseconds")]
    replayed: Annotated[bool, Meta(description="Whether this is the stored answer to an earlier request")]


class MessageAnswer(msgspec.Struct):
    """The agent's answer."""

    response: Annotated[str, Meta(description="What the agent says")]
    metadata: Annotated[AnswerMetadata, Meta(description="Facts about the answer, the graph's and the gateway's")]


class StreamQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Whose turn."""

    session_id: Annotated[SessionId, Meta(description="The session that the turn belongs to")]


class CancelBody(msgspec.Struct, forbid_unknown_fields=True):
    """Whose turn is to be cancelled."""

    session_id: Annotated[SessionId, Meta(description="The session whose running turn is to be cancelled")]


class CancelAnswer(msgspec.Struct):
    """The turn that is being cancelled."""

    turn_id: Annotated[str, Meta(description="The turn's UUID; its stream ends with `turn.cancelled`")]


class AvailabilityQuery(msgspec.Struct, forbid_unknown_fields=True):
    """What a page says of itself."""

    website_domain: Annotated[
        str, Meta(max_length=255, description="The page's host as the page knows it. It opens nothing: only `Origin` does")
    ] = ""


class Availability(msgspec.Struct):
    """The agent answers on this website."""

    agent_id: Annotated[str, Meta(description="The agent's UUID")]
    channels: Annotated[list[Channel], Meta(description="How visitors may talk to it; the first one is the default")]


class ChatApi:
    """The calls about messages. `max_message_chars` bounds a message."""

    def __init__(
        self,
        entrance: Entrance,
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
        self._entrance = entrance
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
                    # An attached reader costs no turn, so the limit of streams alone stops a flood of them.
                    stream.check(turn.session_id)
                    items = await self._streams.open_turn(turn.session_id, begun.turn_id, turn.access, None)
            stream.join(turn.session_id)
            return event_stream(items, stream.hand_over(), admission.headers())

    async def resume(self, request: Request) -> Response:
        """GET /api/chat/{agent_id}/turns/{turn_id}/stream"""
        agent, caller = await self._entrance.enter(request)
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
        agent, caller = await self._entrance.enter(request)
        body = await read_body(request, self._cancel_decoder, self._bounds)
        access = self._gatekeeper.access(caller, agent, body.session_id)
        with audited("turn_cancelled", known_operator(request), agent=agent.id, session=masked(body.session_id)):
            hot = existing(await self._history.find_session(body.session_id, access))
            if not hot.running or await self._logs.cancel(body.session_id, hot.running, access) is not True:
                raise NoTurnRunning
        return answer(CancelAnswer(hot.running), 202)

    async def available(self, request: Request) -> Response:
        """GET /api/chat/{agent_id}"""
        agent = await self._entrance.load_agent(request.path_params["agent_id"], request)
        read_query(request, AvailabilityQuery)
        if not agent.definition.active:
            raise AgentInactive
        self._gatekeeper.require_website(Caller(request), agent)
        # Asked with each page view: browsers keep the answer for five minutes.
        headers = {"Cache-Control": "private, max-age=300", "Vary": "Origin"}
        return answer(Availability(agent.id, list(agent.definition.channels)), headers=headers)

    async def _read(
        self, request: Request, check_session: Callable[[str], None] | None = None
    ) -> tuple[Agent, TurnRequest, Admission]:
        """The agent, the message, and its admission: the message has been charged to its limits."""
        agent, caller = await self._entrance.enter(request)
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
        # Last, so that nothing can fail between the charge and the turn, which refunds it.
        return agent, turn, self._limiter.admit_turn(agent, caller.ip_address, caller.website_domain)

    def _check(self, body: MessageBody) -> None:
        if len(body.message) > self._max_message_chars:
            raise InvalidField(f"message: longer than {self._max_message_chars} characters", field="message")
        check_text(body.message, "message")
        check_metadata(body.metadata, self._bounds)
        check_text(body.audio_url, "audio_url")

    def endpoints(self) -> Sequence[Endpoint]:
        """The calls about messages."""
        turn_errors = (*BODY_ERRORS, *SESSION_ERRORS, 409, 410, 502, 504)
        return [
            Endpoint(
                "POST",
                "/api/chat/{agent_id}/message",
                self.message,
                "Answer a visitor's message",
                {200: MessageAnswer},
                turn_errors,
                description=(
                    "Answers when the turn is committed. The turn goes on when the client hangs up: send the message again "
                    "with the same `message_id` to get its answer."
                ),
                body=MessageBody,
                headers=("Idempotency-Key",),
                answer_headers={200: LIMIT_HEADERS},
                guard="session",
            ),
            Endpoint(
                "POST",
                "/api/chat/{agent_id}/stream",
                self.stream,
                "Answer a visitor's message as a stream of events",
                {200: EVENT_STREAM},
                turn_errors,
                description=(
                    "Sends the answer while it is made. A stream that breaks off without a terminal event was cut: go on "
                    "with it by the next call. Sent again with the same `message_id`, the message gets the stream of its "
                    "own turn."
                ),
                body=MessageBody,
                headers=("Idempotency-Key",),
                answer_headers={200: LIMIT_HEADERS},
                guard="session",
            ),
            Endpoint(
                "GET",
                "/api/chat/{agent_id}/turns/{turn_id}/stream",
                self.resume,
                "Go on with the stream of a turn",
                {200: EVENT_STREAM},
                (*SESSION_ERRORS, 422),
                description=(
                    "Any pod sends exactly the events behind `Last-Event-ID`, or all of them without one, up to the "
                    "terminal event; until five minutes after the turn's last event. `log.reset` comes first if some are "
                    "gone."
                ),
                query=StreamQuery,
                headers=("Last-Event-ID",),
                guard="session",
            ),
            Endpoint(
                "POST",
                "/api/chat/{agent_id}/cancel",
                self.cancel,
                "Cancel the answer that is being made",
                {202: CancelAnswer},
                (*BODY_ERRORS, *SESSION_ERRORS, 409),
                description=(
                    "The waiting request gets 409 `turn_cancelled`, a stream ends with `turn.cancelled`, and the session is "
                    "as it was before the message."
                ),
                body=CancelBody,
                guard="session",
            ),
            Endpoint(
                "GET",
                "/api/chat/{agent_id}",
                self.available,
                "Whether a website may use an agent",
                {200: Availability},
                (403, 404, 422, 429, 503),
                description="The widget asks this before it shows itself, with the `Origin` that the browser adds.",
                query=AvailabilityQuery,
            ),
        ]


def _idempotency_key(request: Request) -> str:
    """The Idempotency-Key header, bare or quoted; empty without one. Raises InvalidField."""
    key = request.headers.get("idempotency-key")
    if key is None:
        return ""
    try:
        return msgspec.convert(key[1:-1] if len(key) > 2 and key[0] == key[-1] == '"' else key, MessageId)
    except msgspec.ValidationError as error:
        raise InvalidField("Idempotency-Key: 1 to 128 of A-Z a-z 0-9 _ . : -", field="Idempotency-Key") from error
