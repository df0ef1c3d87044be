"""Agent definitions: the body of `PUT /api/agents/{agent_id}`, and what is stored of it.

Postgres owns the truth. Redis has a copy of each, so that the chat path does not need Postgres.
"""

from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import msgspec
from msgspec import Meta

from persistence.errors import Damaged
from persistence.model.codec import unreadable
from persistence.model.session import Channel

IfBusy = Literal["queue", "reject", "interrupt"]


class TurnPolicy(msgspec.Struct, frozen=True):
    """The part of a definition that the Redis layer works by.

    `hot_turns` bounds the history given to graphs and the turns kept in Redis; with `rate_shadow` the rate limit refuses
    nothing.
    """

    hot_turns: int
    hot_ttl_s: int
    if_busy: IfBusy = "queue"
    max_waiting: int = 3
    rate_messages: int = 0
    rate_per_s: int = 60
    rate_shadow: bool = False


MIN_HOT_TURNS = 10
"""Turns kept in Redis in any case, so that retries find their answers."""
MAX_SITE_KEYS = 4

SiteKey = Annotated[str, Meta(min_length=19, max_length=255, pattern=r"^(sha256:[0-9a-f]{12}|[!-~][ -~]{30,253}[!-~])\Z")]
"""32 to 255 printable characters, or the fingerprint of such a key."""

Domain = Annotated[str, Meta(min_length=1, max_length=255)]


class RateLimit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """At most `messages` in `per_s` seconds. A burst may take all of them at once; they come back evenly."""

    messages: Annotated[int, Meta(ge=1, le=1_000_000, description="Messages, as many as may come at once")]
    per_s: Annotated[int, Meta(ge=1, le=86_400, description="Seconds in which that many come back")]


class AgentDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an operator sets of an agent."""

    graph: Annotated[
        str, Meta(min_length=1, max_length=255, description="A graph of `langgraph.json`, or a built-in one: `chat`, `echo`")
    ]
    config: Annotated[dict[str, Any], Meta(description="Handed to the graph as LangGraph's `configurable`")] = {}
    allowed_domains: Annotated[
        tuple[Domain, ...],
        Meta(
            max_length=1000,
            description="Websites that may use the agent: hosts, `*.example.com` for all below it, with or without a port. "
            "Empty allows any",
        ),
    ] = ()
    channels: Annotated[
        tuple[Channel, ...], Meta(min_length=1, description="How visitors may talk to it; the first one is the default")
    ] = ("text", "voice", "phone")
    history_window: Annotated[int, Meta(ge=0, le=2000, description="Earlier messages that the graph is given")] = 50
    hot_ttl_s: Annotated[
        int, Meta(ge=1, le=2_592_000, description="Seconds that an idle session stays in Redis once Postgres has it")
    ] = 1800
    turn_timeout_s: Annotated[
        float, Meta(gt=0, le=3600, description="Seconds after which a turn fails with `turn_timeout`")
    ] = 60
    if_busy: Annotated[
        IfBusy,
        Meta(
            description="What a message does while another one of its session is answered: wait (`queue`), be refused "
            "(`reject`), or cancel that answer (`interrupt`)"
        ),
    ] = "queue"
    rate_limit: Annotated[RateLimit | None, Meta(description="Messages of one session; null for no limit")] = RateLimit(
        30, 60
    )
    agent_rate_limit: Annotated[
        RateLimit | None, Meta(description="Messages to the agent, of all its visitors; null for no limit")
    ] = None
    domain_rate_limit: Annotated[
        RateLimit | None, Meta(description="Messages to the agent from one website; null for no limit")
    ] = None
    max_running_turns: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000)] | None,
        Meta(description="Turns of the agent that run at a time; null for no limit"),
    ] = None
    turns_per_day: Annotated[
        Annotated[int, Meta(ge=1, le=1_000_000_000)] | None,
        Meta(description="Turns of the agent in a day, by UTC; null for no limit"),
    ] = None
    require_token: Annotated[
        bool, Meta(description="Whether only minted sessions are taken, and no ids of clients' own making")
    ] = False
    site_keys: Annotated[
        tuple[SiteKey, ...],
        Meta(
            max_length=MAX_SITE_KEYS,
            description="The site's own keys, the newest first. Any of them verifies user tokens, and is the password of "
            "the site's servers. Written whole and shown as `sha256:…`, which keeps the key when written back",
        ),
    ] = ()
    require_identity: Annotated[bool, Meta(description="Whether only visitors with a valid user token are answered")] = False
    active: Annotated[bool, Meta(description="Whether the agent answers at all; off within 5 seconds on all pods")] = True
    truncate_ip: Annotated[
        bool, Meta(description="Whether addresses are stored without their last 8 bits (IPv4) or 80 bits (IPv6)")
    ] = False
    retention_days: Annotated[
        Annotated[int, Meta(ge=1, le=3650)] | None,
        Meta(description="Days without activity after which a session is erased; null keeps sessions"),
    ] = None

    @property
    def policy(self) -> TurnPolicy:
        """The part for the Redis layer. A turn has two messages."""
        limit = self.rate_limit
        return TurnPolicy(
            hot_turns=max(MIN_HOT_TURNS, (self.history_window + 1) // 2),
            hot_ttl_s=self.hot_ttl_s,
            if_busy=self.if_busy,
            rate_messages=limit.messages if limit else 0,
            rate_per_s=limit.per_s if limit else 60,
        )


class Agent(msgspec.Struct, frozen=True):
    """An agent: its UUID, its unique name, its definition."""

    id: str
    name: str
    definition: AgentDefinition


class _Stored(AgentDefinition, frozen=True, forbid_unknown_fields=False, kw_only=True):
    """A stored definition. Fields of a later version are ignored."""


def decode_definition(raw: bytes | str, where: str) -> AgentDefinition:
    """A definition from its stored JSON. Raises Damaged."""
    try:
        return AgentDefinition(**msgspec.structs.asdict(msgspec.json.decode(raw, type=_Stored)))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Damaged(where, "definition", unreadable(error)) from error


def null_parts(kind: Any) -> list[Any]:
    """The types of a field of a definition that may be null, without null; none for any other field."""
    inner = get_args(kind)[0] if get_origin(kind) is Annotated else kind
    parts = get_args(inner)
    return [part for part in parts if part is not NoneType] if NoneType in parts else []
