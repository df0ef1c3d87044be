"""Sessions, turns, messages and records."""

from typing import Annotated, Any, Literal

import msgspec

Channel = Literal["text", "voice", "phone"]

Role = Literal["user", "assistant", "system"]

Count = Annotated[int, msgspec.Meta(ge=0)]

Status = Literal["active", "ended", "timeout", "erased"]


class Message(msgspec.Struct, omit_defaults=True):
    """One message of a turn. `tokens_used`, `latency_ms` (of the turn) and `model_used` belong to assistant messages."""

    id: str
    role: Role
    content: str
    created_at: str
    audio_url: str | None = None
    audio_duration_ms: int | None = None
    tokens_used: int | None = None
    latency_ms: int | None = None
    model_used: str | None = None
    metadata: dict[str, Any] | None = None


class Turn(msgspec.Struct, omit_defaults=True):
    """A committed turn. `seq` numbers its first message within the session, from 1; the others follow.

    `metadata` is that of the answer, so that a retry gets the same. `fence` grows with every turn begun and is the epoch of
    its events; 0 after hydration, because Postgres does not store it.
    """

    id: str
    message_id: str | None
    seq: int
    messages: list[Message]
    metadata: dict[str, Any] = {}
    fence: int = 0


class Session(msgspec.Struct, kw_only=True):
    """A session without its messages, with the members of `fields.py`. Empty text means unknown; only an erased session may
    lack its channel and its agent."""

    id: str
    session_id: str
    agent_id: str
    channel: Channel | Literal[""]
    status: Status
    user_id: str
    website_domain: str
    ip_address: str
    user_agent: str
    started_at: str
    last_activity_at: str
    ended_at: str
    message_count: Count
    context: dict[str, Any]
    metadata: dict[str, Any]
    minted: bool
    turns: Count
    revision: Count


class Record(msgspec.Struct):
    """A durable fact on its way to Postgres: the session as of `revision`, and the turn if the fact is one (`t:<n>`).

    `entry` is its id on the outbox, `bytes` its size in the outbox's counter.
    """

    entry: str
    fact: str
    session: Session
    turn: Turn | None
    bytes: int = 0


class StoredMessage(Message, kw_only=True):
    """A message of a transcript: `seq` is its number in the session, `turn` the number of its turn, both from 1."""

    seq: int
    turn_id: str
    turn: int
    message_id: str | None = None


def transcript(turn: Turn, number: int) -> list[StoredMessage]:
    """The messages of a turn as a transcript shows them, oldest first."""
    return [
        StoredMessage(
            id=message.id,
            role=message.role,
            content=message.content,
            created_at=message.created_at,
            audio_url=message.audio_url,
            audio_duration_ms=message.audio_duration_ms,
            tokens_used=message.tokens_used,
            latency_ms=message.latency_ms,
            model_used=message.model_used,
            metadata=message.metadata,
            seq=turn.seq + index,
            turn_id=turn.id,
            turn=number,
            message_id=turn.message_id if message.role == "user" else None,
        )
        for index, message in enumerate(turn.messages)
    ]


class Access(msgspec.Struct, frozen=True):
    """A caller, compared with the session's own binding. An empty `agent_id` or `website_domain` is not compared.

    `authorized`: the session's token was presented and verified. `user_id`: a verified user. `trusted`: an operator or a
    server of the site, with access to the sessions of all users.
    """

    agent_id: str = ""
    website_domain: str = ""
    authorized: bool = False
    user_id: str = ""
    trusted: bool = False


class NewSession(msgspec.Struct, frozen=True):
    """A session to create. `id` is its UUIDv7; a `minted` session id was made by the gateway, and needs its token."""

    id: str
    session_id: str
    agent_id: str
    channel: str
    website_domain: str
    user_id: str
    ip_address: str
    user_agent: str
    metadata: dict[str, Any]
    minted: bool
    hot_ttl_s: int


class Snapshot(msgspec.Struct):
    """A session read from Postgres, with its newest turns, the first numbered `first`."""

    session: Session
    first: int
    turns: list[Turn]
