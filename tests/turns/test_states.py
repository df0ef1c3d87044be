"""The table of a turn's states: what may follow, what may not, and what is read off a state."""

from typing import get_args

import pytest

from gateway.turns.states import (
    ABORTED,
    ASKING,
    ATTACHED,
    CANCELLED,
    CANCELLED_EARLY,
    COMMITTED,
    LOST,
    NEW,
    REFUSED,
    REPLAYED,
    RUNNING,
    TRANSITIONS,
    WAITING,
    WITHDRAWN,
    IllegalTransition,
    State,
    Trigger,
    next_state,
)

TRIGGERS: tuple[Trigger, ...] = get_args(Trigger)
ENDED = (COMMITTED, ABORTED, REPLAYED, ATTACHED, REFUSED, WITHDRAWN)

# Written out once more, by trigger instead of by state: a slip in one table shows in the other.
LEGAL: dict[Trigger, dict[State, State]] = {
    "asked": {NEW: ASKING, ASKING: ASKING, WAITING: WAITING, CANCELLED_EARLY: CANCELLED_EARLY},
    "absent": {ASKING: ASKING, WAITING: ASKING, CANCELLED_EARLY: CANCELLED_EARLY},
    "busy": {ASKING: ASKING, WAITING: WAITING, CANCELLED_EARLY: CANCELLED_EARLY},
    "queued": {ASKING: WAITING, WAITING: WAITING, CANCELLED_EARLY: CANCELLED_EARLY},
    "begun": {ASKING: RUNNING, WAITING: RUNNING, CANCELLED_EARLY: CANCELLED_EARLY},
    "refused": {NEW: REFUSED, ASKING: REFUSED, WAITING: WAITING, CANCELLED_EARLY: CANCELLED_EARLY},
    "replayed": {ASKING: REPLAYED, WAITING: REPLAYED, CANCELLED_EARLY: REPLAYED},
    "attached": {ASKING: ATTACHED, WAITING: ATTACHED, CANCELLED_EARLY: ATTACHED},
    "cancelled": {
        **dict.fromkeys((NEW, ASKING, WAITING, CANCELLED_EARLY), CANCELLED_EARLY),
        **dict.fromkeys((RUNNING, CANCELLED, LOST), CANCELLED),
        **{state: state for state in ENDED},
    },
    "lost": {RUNNING: LOST, LOST: LOST, CANCELLED: CANCELLED},
    "committed": {RUNNING: COMMITTED, LOST: COMMITTED, CANCELLED: COMMITTED},
    "given_up": {ASKING: WITHDRAWN, WAITING: WITHDRAWN, CANCELLED_EARLY: ABORTED, RUNNING: ABORTED},
}
STEPS = [(state, trigger) for state in TRANSITIONS for trigger in TRIGGERS]
TAKEN = [(state, trigger) for state, trigger in STEPS if state in LEGAL[trigger]]
REFUSED_STEPS = [(state, trigger) for state, trigger in STEPS if state not in LEGAL[trigger]]


def named(step: State | Trigger) -> str:
    return step.name if isinstance(step, State) else step


@pytest.mark.parametrize(("state", "trigger"), TAKEN, ids=named)
def test_a_legal_step_leads_to_its_state(state: State, trigger: Trigger) -> None:
    assert next_state(state, trigger) is LEGAL[trigger][state]


@pytest.mark.parametrize(("state", "trigger"), REFUSED_STEPS, ids=named)
def test_an_illegal_step_is_an_error_that_names_both(state: State, trigger: Trigger) -> None:
    with pytest.raises(IllegalTransition, match=f"a turn that is {state.name} cannot be {trigger}"):
        next_state(state, trigger)


def test_every_state_has_its_row_and_every_row_can_be_reached() -> None:
    reached, known = {NEW}, {NEW, *(state for row in TRANSITIONS.values() for state in row.values())}
    assert known == set(TRANSITIONS)
    for _ in TRANSITIONS:
        reached |= {state for one in reached for state in TRANSITIONS[one].values()}
    assert reached == known


@pytest.mark.parametrize("state", TRANSITIONS, ids=named)
def test_a_turn_can_be_cancelled_from_elsewhere_at_any_time(state: State) -> None:
    assert next_state(state, "cancelled") in TRANSITIONS


@pytest.mark.parametrize("state", TRANSITIONS, ids=named)
def test_a_turn_can_be_given_up_while_it_may_hold_something_and_only_then(state: State) -> None:
    assert ("given_up" in TRANSITIONS[state]) is state.holds
    if state.holds:
        assert not next_state(state, "given_up").holds


@pytest.mark.parametrize("state", ENDED, ids=named)
def test_a_turn_that_has_ended_holds_nothing_and_stays_as_it_is(state: State) -> None:
    assert not state.holds
    assert set(TRANSITIONS[state].values()) == {state}


@pytest.mark.parametrize(("state", "trigger"), TAKEN, ids=named)
def test_a_turn_that_has_run_is_charged_for_it_whatever_comes_of_it(state: State, trigger: Trigger) -> None:
    after = next_state(state, trigger)
    if state.outcome == "ran" and after not in (REPLAYED, ATTACHED):
        assert after.outcome == "ran"
    if trigger == "begun":
        assert after.outcome == "ran"
    if trigger in ("replayed", "attached"):
        assert after.outcome == "repeated"
    if trigger == "refused" and state is not CANCELLED_EARLY:
        assert after.outcome == "refused"
