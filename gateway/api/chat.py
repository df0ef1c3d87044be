"""`/api/chat`: a visitor's messages."""

from typing import Annotated, Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.agents import Agents
from gateway.api.callers import Caller, Gatekeeper
from gateway.api.rendering import answer, check_text, read_body
from gateway.limits import AddressLimiter
from gateway.problems import AgentInactive, InvalidField
from gateway.runtime import AgentRuntime
from gateway.turns import TurnRequest
from persistence.records import Channel
from persistence.sessions import IfBusy

SessionId = Annotated[str, msgspec.Meta(min_length=16, max_length=255, pattern=r"^[A-Za-z0-9_.:-]+\Z")]
MessageId = Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:-]+\Z")]


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


class ChatApi:
    """Answers messages. `max_message_chars` bounds a message."""

    def __init__(
        self,
        agents: Agents,
        runtime: AgentRuntime,
        gatekeeper: Gatekeeper,
        limiter: AddressLimiter | None,
        *,
        max_body_bytes: int,
        max_message_chars: int,
    ) -> None:
        self._agents = agents
        self._runtime = runtime
        self._gatekeeper = gatekeeper
        self._limiter = limiter
        self._max_body_bytes = max_body_bytes
        self._max_message_chars = max_message_chars
        self._decoder = msgspec.json.Decoder(MessageBody)

    async def message(self, request: Request) -> Response:
        """POST /api/chat/{agent_id}/message"""
        body = await read_body(request, self._decoder, self._max_body_bytes)
        self._check(body)
        agent = await self._agents.load(request.path_params["agent_id"])
        if not agent.definition.active:
            raise AgentInactive
        caller = Caller(request, body.metadata)
        self._gatekeeper.require_domain(caller, agent)
        authorized = self._gatekeeper.authorized(caller, body.session_id, agent.id)
        if self._limiter is not None:
            self._limiter.admit(caller.ip_address)
        result = await self._runtime.execute(
            agent,
            TurnRequest(
                session_id=body.session_id,
                message=body.message,
                metadata=body.metadata,
                message_id=body.message_id or "",
                channel=body.channel,
                audio_url=body.audio_url,
                audio_duration_ms=body.audio_duration_ms,
                if_busy=body.if_busy,
                website_domain=caller.website_domain,
                authorized=authorized,
                ip_address=caller.ip_address,
                user_agent=caller.user_agent,
            ),
        )
        return answer(result)

    def _check(self, body: MessageBody) -> None:
        if len(body.message) > self._max_message_chars:
            raise InvalidField(f"message: longer than {self._max_message_chars} characters", field="message")
        check_text(body.message, "message")
        check_text(body.metadata, "metadata")
        check_text(body.audio_url, "audio_url")
