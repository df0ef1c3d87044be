"""What a turn is made of: the input of its graph before, the stored turn after."""

from uuid_utils import uuid7

from gateway.graphs.contract import GraphInput, GraphOutput
from gateway.turns.request import TurnRequest
from persistence.model.agents import AgentDefinition
from persistence.model.session import Message
from persistence.model.session import Turn as StoredTurn
from persistence.model.times import iso
from persistence.redis.outcomes import Begun


def graph_input(request: TurnRequest, begun: Begun, definition: AgentDefinition) -> GraphInput:
    """What the graph is given: the newest `history_window` messages and the new one."""
    window = definition.history_window
    return GraphInput(
        history=begun.history[-window:] if window else [],
        user_input=request.message,
        message_uuid=str(uuid7()),
        context=begun.session.context,
        metadata=request.metadata,
        session_id=request.session_id,
        channel=request.channel or begun.session.channel,
    )


def stored_turn(
    turn_id: str, request: TurnRequest, begun: Begun, given: GraphInput, output: GraphOutput, *, latency_ms: int
) -> StoredTurn:
    """The turn as it is committed. `latency_ms` is how long the graph took."""
    return StoredTurn(
        id=turn_id,
        message_id=request.message_id or None,
        seq=begun.session.message_count + 1,
        messages=[
            Message(
                id=given.message_uuid,
                role="user",
                content=request.message,
                created_at=iso(begun.now_ms),
                audio_url=request.audio_url,
                audio_duration_ms=request.audio_duration_ms,
                metadata=request.metadata or None,
            ),
            Message(
                id=str(uuid7()),
                role="assistant",
                content=output.response,
                # Redis' clock plus what has passed since: one clock for all timestamps.
                created_at=iso(begun.now_ms + latency_ms),
                tokens_used=output.tokens_used,
                latency_ms=latency_ms,
                model_used=output.model_used,
            ),
        ],
        metadata=output.metadata,
        fence=begun.fence,
    )
