"""What the calls about sessions take and answer: their types, and sessions as these show them."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from datetime import datetime
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from gateway.access.caller import UserToken
from gateway.problems import InvalidField
from gateway.turns.request import SessionId
from persistence.history import ListedSession
from persistence.model.session import Channel, Role, Session
from persistence.model.times import iso_from

PageSize = Annotated[int, Meta(ge=1, le=200)]


class OpenBody(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A session to open. Without `session_id` the gateway mints one, and its token is needed from then on."""

    agent_id: Annotated[str, Meta(min_length=1, max_length=100, description="The agent's UUID or name")]
    session_id: Annotated[
        SessionId | None,
        Meta(description="An id of the client's own making, which is a secret: who knows it has the session"),
    ] = None
    channel: Annotated[
        Channel | None, Meta(description="How the visitor talks; the agent's first channel when left out")
    ] = None
    user_token: Annotated[
        Annotated[str, UserToken] | None, Meta(description="A JWT with which the agent's site says who its visitor is")
    ] = None
    metadata: Annotated[
        dict[str, Any],
        Meta(
            description="Facts about the session, kept with it. `website_domain` and `user_agent` count where the headers "
            "`Origin` and `User-Agent` are missing"
        ),
    ] = {}


class OpenedSession(msgspec.Struct):
    """An open session and the token that goes with it."""

    session_id: Annotated[str, Meta(description="The session's id; a minted one begins with `gs_`")]
    session_token: Annotated[str, Meta(description="Goes into `Authorization: Bearer …` of every call about the session")]
    agent_id: Annotated[str, Meta(description="The agent's UUID")]
    channel: Annotated[str, Meta(description="How the visitor talks")]
    status: Annotated[
        str,
        Meta(description="`active`, `timeout` after long without a message (the next one makes it `active`), or `ended`"),
    ]
    started_at: Annotated[str, Meta(description="When the session began: ISO 8601, UTC, with milliseconds")]


class SessionAnswer(msgspec.Struct):
    """A session without its messages."""

    session_id: Annotated[str, Meta(description="The session's id")]
    agent_id: Annotated[str, Meta(description="The agent's UUID")]
    channel: Annotated[str, Meta(description="How the visitor talks: `text`, `voice` or `phone`")]
    status: Annotated[
        str,
        Meta(description="`active`, `timeout` after long without a message (the next one makes it `active`), or `ended`"),
    ]
    user_id: Annotated[str | None, Meta(description="The user whom a user token named, null for an unknown visitor")]
    website_domain: Annotated[
        str | None, Meta(description="The website's host that the session is bound to, if one is known")
    ]
    started_at: Annotated[str, Meta(description="When the session began: ISO 8601, UTC, with milliseconds")]
    last_activity_at: Annotated[str, Meta(description="When its last turn was committed, or when it began")]
    ended_at: Annotated[str | None, Meta(description="When it ended or timed out, null while it is active")]
    message_count: Annotated[int, Meta(description="Messages so far, of the visitor and of the agent")]
    context: Annotated[dict[str, Any], Meta(description="What the agent's graph keeps with the session from turn to turn")]


class ListedAnswer(SessionAnswer):
    """A session in an operator's list."""

    id: Annotated[str, Meta(description="The UUID of its row in Postgres")]
    ip_address: Annotated[str | None, Meta(description="The client's address, shortened if the agent has `truncate_ip`")]
    user_agent: Annotated[str | None, Meta(description="The browser, as it names itself")]
    live: Annotated[bool, Meta(description="Whether the session is in Redis")]


class MessageView(msgspec.Struct, omit_defaults=True):
    """A message of a transcript. Fields without a value are left out."""

    id: Annotated[str, Meta(description="The message's UUID")]
    role: Annotated[Role, Meta(description="Who said it")]
    content: Annotated[str, Meta(description="What was said")]
    created_at: Annotated[str, Meta(description="When: ISO 8601, UTC, with milliseconds")]
    seq: Annotated[int, Meta(description="Its number in the session, from 1")]
    turn_id: Annotated[str, Meta(description="The UUID of the turn that it belongs to")]
    message_id: Annotated[str | None, Meta(description="Of a visitor's message: the `message_id` that it was sent with")] = (
        None
    )
    audio_url: Annotated[str | None, Meta(description="Of a spoken message: where its recording is")] = None
    audio_duration_ms: Annotated[int | None, Meta(description="Of a spoken message: its length in milliseconds")] = None
    tokens_used: Annotated[int | None, Meta(description="Of an answer: the tokens that the graph reported for it")] = None
    latency_ms: Annotated[int | None, Meta(description="Of an answer: how long the turn took, in milliseconds")] = None
    model_used: Annotated[str | None, Meta(description="Of an answer: the model that the graph reported for it")] = None


class MessagesAnswer(msgspec.Struct):
    """A page of a transcript."""

    messages: Annotated[list[MessageView], Meta(description="The page's messages, oldest first")]
    next_before: Annotated[int | None, Meta(description="`before` of the page of older messages, null when there are none")]


class StatisticsAnswer(msgspec.Struct):
    """Totals over sessions, of one agent or of all."""

    total_sessions: Annotated[int, Meta(description="Sessions, live and stored")]
    active_sessions: Annotated[int, Meta(description="Those with the status `active`")]
    avg_messages_per_session: Annotated[float, Meta(description="Messages per session, to two decimals")]
    total_messages: Annotated[int, Meta(description="Messages of all of them")]
    exact: Annotated[
        bool, Meta(description="False while so many records wait for Postgres that they are not counted one by one")
    ]
    partial: Annotated[
        bool,
        Meta(description="True while a part of Redis is away: sessions there are counted as Postgres has them"),
    ]


class ListAnswer(msgspec.Struct):
    """A page of sessions."""

    sessions: Annotated[list[ListedAnswer], Meta(description="By last activity, newest first")]
    next_cursor: Annotated[str | None, Meta(description="`cursor` of the next page, null on the last one")]
    partial: Annotated[
        bool,
        Meta(
            description=(
                "True while a part of Redis is away: of the sessions there, those in Postgres are listed, as they are there"
            )
        ),
    ]


class MessagesQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which part of a transcript."""

    before: Annotated[
        Annotated[int, Meta(ge=1, le=2_147_483_647)] | None,
        Meta(description="Only messages whose `seq` is less; the newest ones when left out"),
    ] = None
    limit: Annotated[PageSize, Meta(description="Messages on the page")] = 50


class StatisticsQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Whose sessions."""

    agent_id: Annotated[str | None, Meta(description="Only sessions of this agent, by UUID or name")] = None


class ListQuery(msgspec.Struct, forbid_unknown_fields=True):
    """Which sessions."""

    agent_id: Annotated[str | None, Meta(description="Only sessions of this agent, by UUID or name")] = None
    status: Annotated[str | None, Meta(description="Only sessions with this status: `active`, `ended` or `timeout`")] = None
    website_domain: Annotated[str | None, Meta(description="Only sessions of this website, by its host")] = None
    channel: Annotated[Channel | None, Meta(description="Only sessions on this channel")] = None
    cursor: Annotated[str | None, Meta(description="`next_cursor` of the page before; the first page when left out")] = None
    limit: Annotated[PageSize, Meta(description="Sessions on the page")] = 50


def view(session: Session) -> SessionAnswer:
    """A session as its visitor may see it."""
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


def listed_view(listed: ListedSession) -> ListedAnswer:
    """A session as operators see it in lists."""
    session = listed.session
    return ListedAnswer(
        **msgspec.structs.asdict(view(session)),
        id=session.id,
        ip_address=session.ip_address or None,
        user_agent=session.user_agent or None,
        live=listed.live,
    )


def encode_cursor(position: tuple[str, str]) -> str:
    """The cursor of a page's last session, from its last activity and its id."""
    return urlsafe_b64encode("\n".join(position).encode()).decode().rstrip("=")


def decode_cursor(cursor: str | None) -> tuple[str, str] | None:
    """The position that `encode_cursor` was given. Raises InvalidField for every other text."""
    if cursor is None:
        return None
    try:
        activity, session_id = urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)).decode().split("\n")
        if iso_from(datetime.fromisoformat(activity)) != activity or activity < "2000":
            raise ValueError(activity)
        msgspec.convert(session_id, SessionId)
    except (ValueError, OverflowError) as error:
        raise InvalidField("cursor: not one of this server's", field="cursor") from error
    return activity, session_id
