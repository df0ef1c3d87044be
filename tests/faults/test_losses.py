"""What the chaos lets pass as lost with a master, and what it never does."""

import json
from typing import Any

from tests.chaos.answers import Answers
from tests.chaos.ledger import Conversation, Ledger, Message
from tests.chaos.losses import Held, Loss, Moment

SESSION = "session_1"
NOTHING = Held({}, {}, frozenset(), frozenset())


def answered(number: int, at: float, *, took_s: float = 0.1, named: bool = False) -> Message:
    """A message with its answer, which came `at`."""
    text = f"secret-0123456789abcdef {number} 0"
    times: dict[str, Any] = {"asked_at": at - took_s, "answered_at": at}
    return Message(number, text, 0, at - took_s, answer=f"answer {number}", turn_id=f"turn-{number}", named=named, **times)


def talked(*messages: Message, **facts: Any) -> tuple[Ledger, Conversation]:
    """A ledger with one conversation."""
    ledger = Ledger()
    conversation = Conversation(SESSION, "secret-0123456789abcdef", "usual", messages=list(messages), **facts)
    ledger.conversations.append(conversation)
    return ledger, conversation


def lose(ledger: Ledger, since: float, until: float, held: Held = NOTHING) -> Loss:
    """A master that was lost."""
    loss = ledger.losses.open("rollback", since)
    ledger.losses.close(loss, until, held)
    return loss


def reply(number: int, earlier: list[int]) -> dict[str, Any]:
    """The body of an answer to a graph that was given these messages."""
    known = {"number": number, "earlier": earlier, "turns": len(earlier)}
    return {
        "response": json.dumps(known),
        "metadata": {"message_count": 2 * len(earlier) + 2, "session_id": SESSION, "turn_id": f"turn-{number}"},
    }


def test_only_what_the_lost_master_answered_may_be_lost() -> None:
    ledger, conversation = talked(answered(1, 99), answered(2, 101), answered(3, 120))
    lose(ledger, 100, 110)
    assert [message.number for message in ledger.safe(conversation)] == [1, 3]


def test_a_request_from_before_the_end_whose_answer_comes_late_was_answered_by_the_next_master() -> None:
    ledger, conversation = talked(answered(1, 110.5, took_s=1), answered(2, 112, took_s=3), answered(3, 110.5, took_s=0.2))
    lose(ledger, 100, 110)
    assert [message.number for message in ledger.safe(conversation)] == [3, 2]


def test_what_postgres_had_may_not_be_lost() -> None:
    ledger, conversation = talked(answered(1, 101), answered(2, 102))
    lose(ledger, 100, 110, Held({SESSION: frozenset(("turn-1",))}, {}, frozenset(), frozenset()))
    assert [message.number for message in ledger.safe(conversation)] == [1]


def test_sessions_of_other_shards_lose_nothing() -> None:
    ledger, conversation = talked(answered(1, 101))
    ledger.losses.close(ledger.losses.open("master-killed", 100, lambda session_id: False), 110, NOTHING)
    assert ledger.safe(conversation)


def test_a_history_may_lack_what_was_lost_and_nothing_else() -> None:
    for earlier, broken in (([1], False), ([1, 2], False), ([2], True), ([], True)):
        message = answered(3, 120)
        ledger, conversation = talked(answered(1, 99), answered(2, 101), message)
        lose(ledger, 100, 110)
        Answers(ledger).check(conversation, message, reply(3, earlier))
        assert bool(ledger.out_of_order) is broken, (earlier, ledger.out_of_order)


def test_an_answer_during_a_fault_is_looked_at_when_it_is_known_what_was_lost() -> None:
    message = answered(3, 109)
    ledger, conversation = talked(answered(1, 101), answered(2, 102), message)
    loss = ledger.losses.open("rollback", 100)
    Answers(ledger).check(conversation, message, reply(3, []))
    assert not ledger.out_of_order
    ledger.losses.close(loss, 108, Held({SESSION: frozenset(("turn-1",))}, {}, frozenset(), frozenset()))
    assert len(ledger.out_of_order) == 1, "Postgres had the first one"


def test_a_lost_answer_may_be_given_anew_and_has_to_be_kept_then() -> None:
    message, again = answered(1, 101), answered(1, 120)
    again.turn_id = "turn-of-the-next-master"
    ledger, conversation = talked(message)
    lose(ledger, 100, 110)
    body = {"response": "another answer", "metadata": {"turn_id": again.turn_id}}
    Answers(ledger).check_repeated(conversation, message, again, body)
    assert not ledger.unexpected and not ledger.doubled
    assert (message.answer, message.turn_id) == ("another answer", again.turn_id)
    assert ledger.safe(conversation) == [message]


def test_a_kept_answer_may_not_be_given_anew() -> None:
    message, again = answered(1, 99), answered(1, 120)
    ledger, conversation = talked(message)
    lose(ledger, 100, 110)
    body = {"response": "another answer", "metadata": {"turn_id": "another"}}
    Answers(ledger).check_repeated(conversation, message, again, body)
    assert ledger.unexpected


def test_ends_and_erasures_hold_if_postgres_knew_of_them() -> None:
    for held, open_again in ((NOTHING, True), (Held({}, {}, frozenset((SESSION,)), frozenset(("row",))), False)):
        for fact in ("ended", "erased"):
            ledger, conversation = talked(closed=Moment(100.9, 101), row_id="row", **{fact: True})
            lose(ledger, 100, 110, held)
            assert ledger.may_be_open_again(conversation) is open_again
    ledger, conversation = talked(closed=Moment(119, 120), ended=True)
    lose(ledger, 100, 110)
    assert not ledger.may_be_open_again(conversation)


def test_a_stranger_may_see_a_session_only_if_that_it_is_a_users_was_lost() -> None:
    for messages, held, broken in (
        ((answered(1, 101, named=True),), NOTHING, False),
        ((answered(1, 99, named=True), answered(2, 101, named=True)), NOTHING, True),
        ((answered(1, 101, named=True), answered(2, 120, named=True)), NOTHING, True),
        ((answered(1, 101, named=True),), Held({}, {SESSION: "user-1"}, frozenset(), frozenset()), True),
    ):
        ledger, conversation = talked(*messages, user="user-1")
        lose(ledger, 100, 110, held)
        Answers(ledger).check_stranger(conversation, "all of it")
        assert bool(ledger.foreign) is broken


def test_a_session_is_not_found_only_if_all_of_it_was_lost() -> None:
    for first_at, broken in ((101.0, False), (99.0, True)):
        ledger, conversation = talked(answered(1, first_at), opened=Moment(100.1, 100.5), token="token")
        lose(ledger, 100, 110)
        Answers(ledger).may_pass("session_not_found", conversation)
        assert bool(ledger.unexpected) is broken
