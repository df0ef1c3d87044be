"""What an answer may be: each is looked at as soon as it comes, and what is wrong with it goes into the ledger."""

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from gateway.streams.events import TERMINAL
from tests.chaos.graphs.recall import SECRET
from tests.chaos.ledger import Conversation, Ledger, Message
from tests.support.sse import Event, text_of

REFUSALS = frozenset(("queue_full", "turn_in_progress", "session_ended"))
"""Codes that say that the message was not answered, and will not be."""
PASSING = frozenset(
    (
        "queue_full",
        "turn_in_progress",
        "redis_unavailable",
        "postgres_unavailable",
        "draining",
        "turn_superseded",
        "turn_lost",
        "turn_timeout",
    )
)
"""Codes that a fault may cause; others are a breach. `session_not_found` is none of them, for a session that cannot be
reached is not absent, unless all of it may be lost with a master; nor is `backlog_full`, for no run comes near the bound."""
NOT_REPLICATED = "not_replicated"
"""Passes only where answers wait for replicas."""


class Answers:
    """Compares answers with the ledger."""

    def __init__(self, ledger: Ledger, passing: frozenset[str] = PASSING) -> None:
        self._ledger = ledger
        self._passing = passing

    def may_pass(self, code: str, conversation: Conversation) -> bool:
        """Whether a fault, or what the visitor did, may be the cause of this answer; else it is written down."""
        if code in self._passing:
            return True
        if code == "session_not_found" and self._ledger.may_be_gone(conversation):
            # Who it is that may be lost is known for sure once the fault is over.
            self._ledger.losses.look(partial(self._look_for_gone, conversation))
            return True
        if (code == "session_damaged" and conversation.damaged) or (code == "session_ended" and conversation.ended):
            return True
        self._ledger.unexpected.append(f"{conversation.session_id}: {code}")
        return False

    def _look_for_gone(self, conversation: Conversation) -> None:
        if not self._ledger.may_be_gone(conversation):
            self._ledger.unexpected.append(f"{conversation.session_id}: session_not_found")

    def look_for_foreign(self, conversation: Conversation, text: str) -> None:
        """No other session's secret is in it."""
        for secret in set(SECRET.findall(text)) - {conversation.secret}:
            self._ledger.foreign.append(f"{conversation.session_id} was shown {secret}")

    def check(self, conversation: Conversation, message: Message, body: dict[str, Any]) -> None:
        """Whether the graph was given all that had been answered before, in order and once."""
        self.look_for_foreign(conversation, json.dumps(body))
        where = f"{conversation.session_id} message {message.number}"
        if body["metadata"]["session_id"] != conversation.session_id:
            self._ledger.foreign.append(f"{where}: the answer names another session")
        before = [other for other in conversation.answered() if other is not message and other.answered_at < message.sent_at]
        self._ledger.losses.look(partial(self._check_history, conversation, message, body, before))

    def _check_history(
        self, conversation: Conversation, message: Message, body: dict[str, Any], before: Sequence[Message]
    ) -> None:
        """A turn that may be lost with a master may be missing, and may come back in another place than it had."""
        where = f"{conversation.session_id} message {message.number}"
        known = json.loads(body["response"])
        earlier = known["earlier"]
        safe = [other.number for other in before if not self._ledger.may_lack(conversation, other)]
        if known["number"] != message.number:
            self._ledger.out_of_order.append(f"{where}: was given the answer to {known['number']}")
        if [number for number in earlier if number in safe] != safe:
            self._ledger.out_of_order.append(f"{where}: the graph was given {earlier}, answered were {safe}")
        # Of a turn that came back behind others, those did not know yet when they stored the context.
        least = len(earlier) - (len(before) - len(safe))
        if not least <= known["turns"] <= len(earlier):
            self._ledger.out_of_order.append(
                f"{where}: the context knows {known['turns']} turns, the history {len(earlier)}"
            )
        if body["metadata"]["message_count"] != 2 * len(earlier) + 2:
            self._ledger.out_of_order.append(f"{where}: {body['metadata']['message_count']} messages after turns {earlier}")

    def check_repeated(self, conversation: Conversation, message: Message, again: Message, body: dict[str, Any]) -> None:
        """Whether a message that had been answered got the same answer again, and no new one. One whose answer may be lost
        with a master may be answered anew: from then on that is its answer."""
        self.look_for_foreign(conversation, json.dumps(body))
        where = f"{conversation.session_id} message {message.number}"
        was, moment = (message.answer or "", message.turn_id), message.moment
        now = (body["response"], body["metadata"]["turn_id"])
        if now == was:
            return
        if self._ledger.may_lack(conversation, message):
            message.former.append(was)
            (message.answer, message.turn_id), message.asked_at, message.answered_at = now, again.asked_at, again.answered_at

        def judge() -> None:
            if self._ledger.losses.turn(conversation.session_id, was[1], moment) is not None:
                return
            if now[0] != was[0]:
                self._ledger.unexpected.append(f"{where} was answered twice, with different texts")
            else:
                self._ledger.doubled.append(f"{where} was answered, and answered by another turn when it was sent again")

        self._ledger.losses.look(judge)

    def check_transcript(self, conversation: Conversation, messages: list[dict[str, Any]]) -> None:
        """Whether a transcript has all that has been answered, in order and once, with the same texts. When the session has
        been erased: whether nothing is in it but what was still on its way then."""
        if conversation.erased:
            self._ledger.losses.look(partial(self._check_erased, conversation, messages))
        else:
            self._ledger.losses.look(partial(self._check_messages, conversation, conversation.answered(), messages))

    def _check_erased(self, conversation: Conversation, messages: list[dict[str, Any]]) -> None:
        found = _numbers(messages)
        if set(found) - conversation.doubtful() and not self._ledger.may_be_open_again(conversation):
            self._ledger.unexpected.append(f"{conversation.session_id} was erased, and its transcript has {found}")

    def _check_messages(
        self, conversation: Conversation, answered: Sequence[Message], messages: list[dict[str, Any]]
    ) -> None:
        where, found = conversation.session_id, _numbers(messages)
        safe = [message for message in answered if not self._ledger.may_lack(conversation, message)]
        numbers = [message.number for message in safe]
        if [number for number in found if number in numbers] != numbers:
            self._ledger.out_of_order.append(f"{where}: answered {numbers}, its transcript has {found}")
        if [one["seq"] for one in messages] != list(range(1, len(messages) + 1)):
            self._ledger.out_of_order.append(f"{where}: its transcript numbers {[one['seq'] for one in messages]}")
        texts = {one["turn_id"]: one["content"] for one in messages if one["role"] == "assistant"}
        shown = {one["message_id"]: texts.get(one["turn_id"]) for one in messages if one["role"] == "user"}
        for message in safe:
            if message.message_id in shown and not message.former and shown[message.message_id] != message.answer:
                self._ledger.out_of_order.append(f"{where} message {message.number}: its transcript has another answer")

    def check_stranger(self, conversation: Conversation, text: str) -> None:
        """A stranger was shown the session of a user."""
        bound = conversation.bound()

        def judge() -> None:
            if not all(self._ledger.losses.user(conversation.session_id, message.moment) for message in bound):
                self._ledger.foreign.append(
                    f"{conversation.session_id} is a user's, and was shown to a stranger: {text[:80]}"
                )

        self._ledger.losses.look(judge)


def _numbers(messages: Sequence[dict[str, Any]]) -> list[int]:
    """The numbers of the visitor's messages in a transcript."""
    return [int(one["content"].split()[1]) for one in messages if one["role"] == "user"]


class Told:
    """The events of one streamed turn, as a visitor saw them over all its connections."""

    def __init__(self, ledger: Ledger, conversation: Conversation, message: Message) -> None:
        self._ledger = ledger
        self._session_id = conversation.session_id
        self._where = f"{conversation.session_id} message {message.number}"
        self._events: list[Event] = []
        self._whole = True
        self.turn_id = ""
        self.resumed = 0

    @property
    def cursor(self) -> str:
        return self._events[-1].id if self._events else ""

    @property
    def end(self) -> Event | None:
        return self._events[-1] if self._events and self._events[-1].kind in TERMINAL else None

    def add(self, event: Event) -> None:
        """Notes the next event. Numbers have no gap, but where the log says so; one terminal event, and nothing after it."""
        last = self._events[-1] if self._events else None
        if self.end is not None:
            self._wrong(f"{event} came after the end")
        if event.kind == "log.reset":
            self._whole = False
        elif last is None:
            # Who asks again for a turn whose pod died before it had stored anything is told its end at once.
            if event.kind not in ("turn.started", "turn.failed"):
                self._wrong(f"began with {event}")
        elif (event.epoch, event.n) not in self._next(event, last):
            self._wrong(f"{event} came after {last}")
        if event.kind == "turn.started":
            self.turn_id = event.data["turn_id"]
            if event.data["session_id"] != self._session_id:
                self._wrong(f"a stream of {event.data['session_id']}")
        self._events.append(event)
        if event.kind == "turn.completed" and self._whole and text_of(self._events) != event.data["response"]:
            self._wrong(f"was streamed {text_of(self._events)!r}, the answer is {event.data['response']!r}")

    def _next(self, event: Event, last: Event) -> set[tuple[int, int]]:
        numbers = {(last.epoch, last.n + 1)}
        if self.resumed and event.kind in TERMINAL:
            # Events that were shown before they were stored may be lost with their pod; the end then has a number of theirs.
            numbers.add((last.epoch, last.n))
        return numbers

    def _wrong(self, what: str) -> None:
        self._ledger.out_of_order.append(f"{self._where}: {what}")
