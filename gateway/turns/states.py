"""The states of a turn, and the only place that says which follows which.

    NEW ──▶ ASKING ◀──▶ WAITING ────▶ REPLAYED, ATTACHED, REFUSED or WITHDRAWN: it ran nothing
               │           │
               └─────┬─────┘
                     ▼
                  RUNNING ──▶ COMMITTED
                     └──────▶ ABORTED, CANCELLED or LOST: the session is as it was before

Two states differ in what the turn may hold in Redis, in what its admission is charged for, or in what may come next; all
three are read off the state and kept nowhere else. A transition that is not in the table is a defect of the caller.

`cancelled` comes from other pods at any time, so every state takes it. Redis may cancel a turn before its pod has got the
reply of `begin`: that turn is CANCELLED_EARLY until the reply is in. RUNNING lasts until the commit has been answered, and
the commit has the last word: it decides for LOST and CANCELLED too.
"""

from typing import Literal

import msgspec

from gateway.limits.admission import Outcome

Trigger = Literal[
    "asked",  # a begin is sent
    "absent",  # the session is not in Redis
    "busy",  # another turn runs, and keeps no place for this one
    "queued",  # Redis keeps a place for this turn behind others
    "begun",  # Redis gave this turn the session's lease
    "refused",
    "replayed",  # the message was answered before
    "attached",  # the message is being answered by another turn, which the caller follows
    "cancelled",  # in Redis, which took the lease back
    "lost",  # the lease ran out and is another turn's
    "committed",
    "given_up",  # what the turn may hold is on its way back
]


class State(msgspec.Struct, frozen=True, eq=False):
    """A state. `holds`: Redis may keep the session's lease or a place in its queue for the turn, which an abort returns."""

    name: str
    holds: bool
    outcome: Outcome


NEW = State("new", False, "refused")
ASKING = State("asking", True, "refused")
WAITING = State("waiting", True, "refused")
CANCELLED_EARLY = State("cancelled early", True, "ran")
RUNNING = State("running", True, "ran")
COMMITTED = State("committed", False, "ran")
ABORTED = State("aborted", False, "ran")
CANCELLED = State("cancelled", False, "ran")
LOST = State("lost", False, "ran")
REPLAYED = State("replayed", False, "repeated")
ATTACHED = State("attached", False, "repeated")
REFUSED = State("refused", False, "refused")
WITHDRAWN = State("withdrawn", False, "refused")

TRANSITIONS: dict[State, dict[Trigger, State]] = {
    NEW: {"asked": ASKING, "refused": REFUSED, "cancelled": CANCELLED_EARLY},
    ASKING: {
        "asked": ASKING,
        "absent": ASKING,
        "busy": ASKING,
        "queued": WAITING,
        "begun": RUNNING,
        "refused": REFUSED,
        "replayed": REPLAYED,
        "attached": ATTACHED,
        "cancelled": CANCELLED_EARLY,
        "given_up": WITHDRAWN,
    },
    WAITING: {
        "asked": WAITING,
        # The queue went with the session.
        "absent": ASKING,
        "busy": WAITING,
        "queued": WAITING,
        "begun": RUNNING,
        # A refusal leaves the place in the queue, which is then given up.
        "refused": WAITING,
        "replayed": REPLAYED,
        "attached": ATTACHED,
        "cancelled": CANCELLED_EARLY,
        "given_up": WITHDRAWN,
    },
    CANCELLED_EARLY: {
        "asked": CANCELLED_EARLY,
        "absent": CANCELLED_EARLY,
        "busy": CANCELLED_EARLY,
        "queued": CANCELLED_EARLY,
        "begun": CANCELLED_EARLY,
        "refused": CANCELLED_EARLY,
        "replayed": REPLAYED,
        "attached": ATTACHED,
        "cancelled": CANCELLED_EARLY,
        "given_up": ABORTED,
    },
    RUNNING: {"committed": COMMITTED, "cancelled": CANCELLED, "lost": LOST, "given_up": ABORTED},
    CANCELLED: {"committed": COMMITTED, "cancelled": CANCELLED, "lost": CANCELLED},
    LOST: {"committed": COMMITTED, "cancelled": CANCELLED, "lost": LOST},
    COMMITTED: {"cancelled": COMMITTED},
    ABORTED: {"cancelled": ABORTED},
    REPLAYED: {"cancelled": REPLAYED},
    ATTACHED: {"cancelled": ATTACHED},
    REFUSED: {"cancelled": REFUSED},
    WITHDRAWN: {"cancelled": WITHDRAWN},
}


class IllegalTransition(Exception):
    """A turn took a step that its state does not allow: a defect of gateway.turns."""


def next_state(state: State, trigger: Trigger) -> State:
    """The state after a trigger. Raises IllegalTransition."""
    try:
        return TRANSITIONS[state][trigger]
    except KeyError:
        raise IllegalTransition(f"a turn that is {state.name} cannot be {trigger}") from None
