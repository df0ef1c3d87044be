"""How long visitors had to wait because of a fault, and what is promised about that."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.chaos.faults import FAULTS, Window
from tests.chaos.ledger import Conversation, Ledger, Message

REDIS_BACK_S = 3.0
"""How long after Redis accepts connections again everybody is answered."""
LEASE_SLACK_S = 1.0
REDIS = ("redis-killed", "redis-restarted")
HARMLESS = ("worker-killed", "worker-stalled", "postgres-killed", "postgres-down")
"""Faults that no session in Redis may notice."""


@dataclass
class Seen:
    """A kind of fault, as visitors saw it. `hit_s` is the longest that a session which it hit waited for an answer beyond
    the answer's own work, `others_s` the same of all others; `turned_away` counts the others' requests that were refused or
    broke off, by code."""

    name: str
    times: int = 0
    answered: int = 0
    hit_s: float = 0.0
    others_s: float = 0.0
    turned_away: Counter[str] = field(default_factory=Counter)


def seen(windows: Sequence[Window], ledger: Ledger) -> list[Seen]:
    """What visitors saw of each kind of fault that came alone, and of those that came together."""
    kinds = {name: Seen(name) for name in FAULTS}
    kinds["several at once"] = Seen("several at once")
    for window in windows:
        kinds[_kind(window)].times += 1
    for conversation, message in ledger.messages():
        met = _window_of(message, windows)
        if met is None:
            continue
        kind = kinds[_kind(met)]
        kind.answered += message.answer is not None
        waited_s = _waited_s(met, message) if message.answer is not None else 0
        if conversation.session_id in met.victims or set(met.names) & set(REDIS):
            kind.hit_s = max(kind.hit_s, waited_s)
        elif not _needs_postgres(conversation, message):
            kind.others_s = max(kind.others_s, waited_s)
            kind.turned_away.update(code or "cut off" for _, code, _ in message.failures)
    return [kind for kind in kinds.values() if kind.times]


def _kind(window: Window) -> str:
    return window.names[0] if len(window.names) == 1 else "several at once"


def _window_of(message: Message, windows: Sequence[Window]) -> Window | None:
    """The fault that a message met: the one that made its first attempt fail, or in which it was sent."""
    met_at = message.failures[0][0] if message.failures else message.sent_at
    return next((window for window in windows if window.began_at <= met_at <= window.ended_at), None)


def _waited_s(window: Window, message: Message) -> float:
    """Beyond its own work; with Redis away it counts from when Redis accepts connections again."""
    waited_s = message.waited_s
    if set(window.names) & set(REDIS):
        waited_s = min(waited_s, message.answered_at - window.mended_at - message.work_s)
    return max(0.0, waited_s)


def _needs_postgres(conversation: Conversation, message: Message) -> bool:
    """Whether the session may not have been in Redis: it leaves it soon, or nothing of it had been answered yet."""
    opened = conversation.token or any(other.answered_at < message.sent_at for other in conversation.answered())
    return conversation.agent == "brief" or not opened


def limits_broken(kinds: Iterable[Seen], lease_s: float) -> list[str]:
    """What took longer than promised."""
    broken = []
    for kind in kinds:
        if kind.name == "pod-killed" and kind.hit_s > lease_s + LEASE_SLACK_S:
            broken.append(f"{kind.name}: a session on the pod waited {kind.hit_s:.1f} s, the lease is {lease_s:g} s")
        if kind.name in REDIS and kind.hit_s > REDIS_BACK_S:
            broken.append(f"{kind.name}: a session waited {kind.hit_s:.1f} s after Redis was back")
        if (kind.name in HARMLESS or kind.name == "pod-killed") and kind.turned_away:
            broken.append(
                f"{kind.name}: requests of sessions that it did not hit were turned away: {dict(kind.turned_away)}"
            )
    return broken
