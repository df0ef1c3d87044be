"""How long visitors had to wait because of a fault, and what is promised about that."""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tests.chaos.faults import FAULTS
from tests.chaos.harm import Window
from tests.chaos.ledger import Conversation, DiskStall, Ledger, Message

REDIS_BACK_S = 3.0
"""How long after Redis accepts connections again everybody is answered."""
LEASE_SLACK_S = 1.0
CLOCK_S = 3.0
"""What a session may wait beyond a lease when the clock of Redis was set back: a lease of the future is clamped."""
BUSY_S = 3.0
"""What a busy machine may take where nobody is to notice anything."""
COMES_BACK = frozenset(name for name, fault in FAULTS.items() if fault.comes_back)
PROMISED_BACK = ("redis-killed", "redis-restarted")
"""Of those, after which REDIS_BACK_S is promised: nothing of any session has to be looked up."""
POSTGRES = frozenset(name for name, fault in FAULTS.items() if fault.part == "postgres")
HARMLESS = frozenset(name for name, fault in FAULTS.items() if fault.harmless)
"""Faults that no session in Redis may notice."""


@dataclass
class Seen:
    """A kind of fault, as visitors saw it. `hit_s` is the longest that a session which it hit waited for an answer beyond
    the answer's own work, `others_s` the same of all others; `turned_away` counts the others' requests that were refused or
    broke off, by code. `refused_s` is the longest time in which a session was refused, hit or not, from its message to the
    last refusal."""

    name: str
    times: int = 0
    answered: int = 0
    hit_s: float = 0.0
    others_s: float = 0.0
    refused_s: float = 0.0
    turned_away: Counter[str] = field(default_factory=Counter)


def seen(windows: Sequence[Window], ledger: Ledger) -> list[Seen]:
    """What visitors saw of each kind of fault that came alone, and of those that came together."""
    kinds = {name: Seen(name) for name in FAULTS}
    kinds["several at once"] = Seen("several at once")
    for window in windows:
        kinds[_kind(window)].times += 1
    for conversation in ledger.conversations:
        for wait in conversation.waits():
            met = _window_of(wait, windows)
            if met is None:
                continue
            kind = kinds[_kind(met)]
            kind.answered += wait[-1].answer is not None
            waited_s = _waited_s(met, wait, ledger.disk_stalls.values())
            refusals = [when for message in wait for when, code, _ in message.failures if code]
            if refusals:
                kind.refused_s = max(kind.refused_s, refusals[-1] - wait[0].sent_at)
            if met.hits(conversation.session_id) or set(met.names) & COMES_BACK:
                kind.hit_s = max(kind.hit_s, waited_s)
            elif not (set(met.names) & POSTGRES and _needs_postgres(conversation, wait[0])):
                kind.others_s = max(kind.others_s, waited_s)
                kind.turned_away.update(code or "cut off" for message in wait for _, code, _ in message.failures)
    return [kind for kind in kinds.values() if kind.times]


def turned_away_in_peace(windows: Sequence[Window], ledger: Ledger) -> list[str]:
    """Requests that were not answered although no fault was on."""
    return [
        f"{conversation.session_id} message {wait[0].number}: {wait[0].failures} while no fault was on"
        for conversation in ledger.conversations
        for wait in conversation.waits()
        if wait[0].failures and _window_of(wait, windows) is None
    ]


def _kind(window: Window) -> str:
    return window.names[0] if len(window.names) == 1 else "several at once"


def _window_of(wait: Sequence[Message], windows: Sequence[Window]) -> Window | None:
    """The fault that a wait met: the one that made the first attempt fail, or else the first that was not calm yet while the
    message was on its way."""
    first = wait[0]
    if first.failures:
        failed_at = first.failures[0][0]
        return next((window for window in windows if window.began_at <= failed_at <= window.ended_at), None)
    until = _until(wait)
    return next((window for window in windows if window.began_at <= until and first.sent_at <= window.calm_at), None)


def _until(wait: Sequence[Message]) -> float:
    """When it was over; whoever never got an answer waited until the last attempt failed."""
    last = wait[-1]
    return last.answered_at if last.answer is not None else last.failures[-1][0] if last.failures else last.sent_at


def _waited_s(window: Window, wait: Sequence[Message], stalls: Iterable[DiskStall]) -> float:
    """Beyond the answer's own work and the time in which the disk held Redis up; with Redis away it counts from when Redis
    accepts connections again."""
    until, since = _until(wait), wait[0].sent_at
    if set(window.names) & COMES_BACK:
        since = max(since, window.mended_at)
    stalled_s = sum(stall.within(since, until) for stall in stalls)
    return max(0.0, until - since - wait[-1].work_s - stalled_s)


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
        if kind.name in PROMISED_BACK and kind.hit_s > REDIS_BACK_S:
            broken.append(f"{kind.name}: a session waited {kind.hit_s:.1f} s after Redis was back")
        if kind.name == "clock-set-back" and kind.others_s > lease_s + CLOCK_S:
            broken.append(f"{kind.name}: a session waited {kind.others_s:.1f} s, the lease is {lease_s:g} s")
        if (kind.name in HARMLESS or kind.name == "pod-killed") and kind.turned_away:
            broken.append(
                f"{kind.name}: requests of sessions that it did not hit were turned away: {dict(kind.turned_away)}"
            )
        if (kind.name in HARMLESS or kind.name == "pod-killed") and kind.others_s > BUSY_S:
            broken.append(f"{kind.name}: a session that it did not hit waited {kind.others_s:.1f} s")
    return broken
