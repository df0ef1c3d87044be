"""What an answer may be: each is looked at as soon as it comes, and what is wrong with it goes into the ledger."""

import json
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
reached is not absent; nor is `backlog_full`, for no run comes near the bound."""


class Answers:
    """Compares answers with the ledger."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger

    def may_pass(self, code: str, conversation: Conversation) -> bool:
        """Whether a fault, or what the visitor did, may be the cause of this answer; else it is written down."""
        if code in PASSING:
            return True
        if (code == "session_damaged" and conversation.damaged) or (code == "session_ended" and conversation.ended):
            return True
        self._ledger.unexpected.append(f"{conversation.session_id}: {code}")
        return False

    def look_for_foreign(self, conversation: Conversation, text: str) -> None:
        """No other session's secret is in it."""
        for secret in set(SECRET.findall(text)) - {conversation.secret}:
            self._ledger.foreign.append(f"{conversation.session_id} was shown {secret}")

    def check(self, conversation: Conversation, message: Message, body: dict[str, Any]) -> None:
        """Whether the graph was given all that had been answered before, in order and once."""
        self.look_for_foreign(conversation, json.dumps(body))
        where = f"{conversation.session_id} message {message.number}"
        known = json.loads(body["response"])
        earlier = known["earlier"]
        before = [
            other.number for other in conversation.answered() if other is not message and other.answered_at < message.sent_at
        ]
        if known["number"] != message.number:
            self._ledger.out_of_order.append(f"{where}: was given the answer to {known['number']}")
        if [number for number in earlier if number in before] != before:
            self._ledger.out_of_order.append(f"{where}: the graph was given {earlier}, answered were {before}")
        if known["turns"] != len(earlier):
            self._ledger.out_of_order.append(
                f"{where}: the context knows {known['turns']} turns, the history {len(earlier)}"
            )
        if body["metadata"]["message_count"] != 2 * len(earlier) + 2:
            self._ledger.out_of_order.append(f"{where}: {body['metadata']['message_count']} messages after turns {earlier}")
        if body["metadata"]["session_id"] != conversation.session_id:
            self._ledger.foreign.append(f"{where}: the answer names another session")

    def check_repeated(self, conversation: Conversation, message: Message, body: dict[str, Any]) -> None:
        """Whether a message that had been answered got the same answer again, and no new one."""
        self.look_for_foreign(conversation, json.dumps(body))
        where = f"{conversation.session_id} message {message.number}"
        if body["response"] != message.answer:
            self._ledger.unexpected.append(f"{where} was answered twice, with different texts")
        elif body["metadata"]["turn_id"] != message.turn_id:
            self._ledger.doubled.append(f"{where} was answered, and answered by another turn when it was sent again")

    def check_transcript(self, conversation: Conversation, messages: list[dict[str, Any]]) -> None:
        """Whether a transcript has all that has been answered, in order and once, with the same texts. When the session has
        been erased: whether nothing is in it but what was still on its way then."""
        where = conversation.session_id
        found = [int(one["content"].split()[1]) for one in messages if one["role"] == "user"]
        if conversation.erased:
            if set(found) - conversation.doubtful():
                self._ledger.unexpected.append(f"{where} was erased, and its transcript has {found}")
            return
        answered = [message.number for message in conversation.answered()]
        if [number for number in found if number in answered] != answered:
            self._ledger.out_of_order.append(f"{where}: answered {answered}, its transcript has {found}")
        if [one["seq"] for one in messages] != list(range(1, len(messages) + 1)):
            self._ledger.out_of_order.append(f"{where}: its transcript numbers {[one['seq'] for one in messages]}")
        texts = {one["turn_id"]: one["content"] for one in messages if one["role"] == "assistant"}
        shown = {one["message_id"]: texts.get(one["turn_id"]) for one in messages if one["role"] == "user"}
        for message in conversation.answered():
            if message.message_id in shown and shown[message.message_id] != message.answer:
                self._ledger.out_of_order.append(f"{where} message {message.number}: its transcript has another answer")


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
