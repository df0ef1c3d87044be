"""Agent definitions. Postgres owns the truth; Redis has a copy of each, so that the chat path never asks Postgres."""

from typing import Annotated, Any, Literal

import msgspec

from persistence.errors import Damaged
from persistence.model.codec import unreadable
from persistence.model.session import Channel

IfBusy = Literal["queue", "reject", "interrupt"]


class TurnPolicy(msgspec.Struct, frozen=True):
    """What an agent sets for its turns. `hot_turns` bounds both the history given back and the hot window; a rate limit
    with `rate_shadow` refuses nothing."""

    hot_turns: int
    hot_ttl_s: int
    if_busy: IfBusy = "queue"
    max_waiting: int = 3
    rate_messages: int = 0
    rate_per_s: int = 60
    rate_shadow: bool = False


MIN_HOT_TURNS = 10

MAX_SITE_KEYS = 4

# 32 to 255 printable characters, or the fingerprint of one.
SiteKey = Annotated[
    str, msgspec.Meta(min_length=19, max_length=255, pattern=r"^(sha256:[0-9a-f]{12}|[!-~][ -~]{30,253}[!-~])\Z")
]

Domain = Annotated[str, msgspec.Meta(min_length=1, max_length=255)]


class RateLimit(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """At most `messages` turns in `per_s` seconds; a burst may take all of them at once."""

    messages: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)]
    per_s: Annotated[int, msgspec.Meta(ge=1, le=86_400)]


class AgentDefinition(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What an operator sets of an agent: the body of `PUT /api/agents/{agent_id}`.

    `graph` names a built-in graph or an entry of langgraph.json, `config` is handed to it. `history_window` counts
    messages. `hot_ttl_s` is how long an idle session stays in Redis. An empty `allowed_domains` allows any. With
    `truncate_ip` a visitor's address is not stored whole; a session without activity for `retention_days` is erased.

    Limits, over all pods: `rate_limit` is per session, `domain_rate_limit` per website domain, `agent_rate_limit` for the
    whole agent; `max_running_turns` at a time; `turns_per_day` by UTC days. Without `active` it answers nobody.

    `site_keys` are the site's own, the newest first: any of them verifies what the site has signed for its visitors, and is
    the site's servers' password. They are written whole, and shown as fingerprints; a fingerprint that is written keeps the
    key that it is of. `require_token` takes minted sessions alone, `require_identity` known users alone.
    """

    graph: Annotated[str, msgspec.Meta(min_length=1, max_length=255)]
    config: dict[str, Any] = {}
    allowed_domains: Annotated[tuple[Domain, ...], msgspec.Meta(max_length=1000)] = ()
    channels: Annotated[tuple[Channel, ...], msgspec.Meta(min_length=1)] = ("text", "voice", "phone")
    history_window: Annotated[int, msgspec.Meta(ge=0, le=2000)] = 50
    hot_ttl_s: Annotated[int, msgspec.Meta(ge=1, le=2_592_000)] = 1800
    turn_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 60
    if_busy: IfBusy = "queue"
    rate_limit: RateLimit | None = RateLimit(30, 60)
    agent_rate_limit: RateLimit | None = None
    domain_rate_limit: RateLimit | None = None
    max_running_turns: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    turns_per_day: Annotated[int, msgspec.Meta(ge=1, le=1_000_000_000)] | None = None
    require_token: bool = False
    site_keys: Annotated[tuple[SiteKey, ...], msgspec.Meta(max_length=MAX_SITE_KEYS)] = ()
    require_identity: bool = False
    active: bool = True
    truncate_ip: bool = False
    retention_days: Annotated[int, msgspec.Meta(ge=1, le=3650)] | None = None

    @property
    def policy(self) -> TurnPolicy:
        """What the Redis layer needs to know of it. A turn has two messages; some stay hot in any case, for retries."""
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
    """A definition as it is stored, perhaps by a later version: what is not known is passed over."""


def decode_definition(raw: bytes | str, where: str) -> AgentDefinition:
    """A definition from its stored JSON. Raises Damaged."""
    try:
        return AgentDefinition(**msgspec.structs.asdict(msgspec.json.decode(raw, type=_Stored)))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise Damaged(where, "definition", unreadable(error)) from error
