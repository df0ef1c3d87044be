"""What is asked of a turn and what it answers."""

from typing import Annotated, Any

import msgspec

from persistence.model.agents import IfBusy
from persistence.model.session import Access, Channel

SessionId = Annotated[str, msgspec.Meta(min_length=16, max_length=255, pattern=r"^[A-Za-z0-9_.:-]+\Z")]

MessageId = Annotated[str, msgspec.Meta(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.:-]+\Z")]


class TurnRequest(msgspec.Struct, kw_only=True):
    """A visitor's message and its sender: `access` names the agent, the website and the user."""

    session_id: str
    message: str
    metadata: dict[str, Any] = {}
    message_id: str = ""
    channel: Channel | None = None
    audio_url: str | None = None
    audio_duration_ms: int | None = None
    if_busy: IfBusy | None = None
    access: Access
    ip_address: str = ""
    user_agent: str = ""


class TurnResult(msgspec.Struct):
    """The answer, as the client gets it."""

    response: str
    metadata: dict[str, Any]


class Attached(msgspec.Struct):
    """The message is being answered already, by this turn."""

    turn_id: str
