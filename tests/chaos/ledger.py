"""What the visitors sent and what they were answered: the history that everything else is compared with."""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

from tests.chaos.losses import Losses, Moment

Agent = Literal["usual", "brief"]
LEFT_BEHIND_S = 30.0
"""How long a turn may go on whose asker is gone."""


@dataclass
class Message:
    """One message of a visitor. Times are seconds of the monotonic clock.

    `asked_at` is when the last attempt began. `failures` are the attempts that were not answered: when, with which code (''
    when the connection broke), at which pod. `doubtful` once one of them ended without a clear word: the message may have
    been answered all the same. `named` when the user's token came with it. `former` are answers, with their turns, that were
    lost with a master before the message was answered anew.
    """

    number: int
    text: str
    work_s: float
    sent_at: float
    failures: list[tuple[float, str, int]] = field(default_factory=list)
    pod: int = -1
    asked_at: float = 0.0
    answer: str | None = None
    turn_id: str = ""
    answered_at: float = 0.0
    doubtful: bool = False
    named: bool = False
    former: list[tuple[str, str]] = field(default_factory=list)

    @property
    def message_id(self) -> str:
        return f"m{self.number}"

    @property
    def moment(self) -> Moment:
        """When it was answered."""
        return Moment(self.asked_at, self.answered_at)


@dataclass(frozen=True)
class DiskStall:
    """Redis could not answer for `took_s` seconds, for it waited for its disk. It noted so within the second from `second`
    on, of the monotonic clock."""

    second: float
    took_s: float

    def within(self, since: float, until: float) -> float:
        """The seconds of it that may lie in a time."""
        overlap_s = min(until, self.second + 1) - max(since, self.second - self.took_s)
        return min(self.took_s, max(0.0, overlap_s))


@dataclass
class Conversation:
    """One session: its own secret is in each of its messages. Minted ones have a token; those of a `user` of the site are
    nobody else's from message `named_from` on. `opened` and `closed` are when a session was minted, and when it was ended or
    erased; `row_id` is its row in Postgres, as far as known. `gone` once the gateway has lost it with a master."""

    session_id: str
    secret: str
    agent: Agent
    token: str = ""
    user: str = ""
    named_from: int = 1
    opened: Moment | None = None
    closed: Moment | None = None
    row_id: str = ""
    gone: bool = False
    messages: list[Message] = field(default_factory=list)
    ended: bool = False
    erased: bool = False
    over: bool = False
    damaged: bool = False

    def answered(self) -> list[Message]:
        """In the order of their answers: one that was answered anew has its place behind those before it."""
        found = [message for message in self.messages if message.answer is not None]
        return sorted(found, key=lambda message: message.answered_at)

    def bound(self) -> list[Message]:
        """The answered messages with which the session was bound to its user."""
        return [message for message in self.answered() if message.named]

    def waits(self) -> list[list[Message]]:
        """Each message that was answered, behind those before it that the visitor gave up: together they are one wait."""
        waits: list[list[Message]] = []
        over = True
        for message in self.messages:
            if over:
                waits.append([])
            waits[-1].append(message)
            over = message.answer is not None
        return waits

    def known(self) -> bool:
        """Whether the gateway has answered that it has this session."""
        return bool(self.token or self.answered())

    def heard_since(self, since: float) -> bool:
        """Whether one of its messages has been answered or refused since then."""
        return any(
            message.answered_at > since or any(when > since for when, _, _ in message.failures) for message in self.messages
        )

    def doubtful(self) -> set[int]:
        """The numbers of the messages of which a request may still be on its way: after erasure it opens a session anew."""
        return {message.number for message in self.messages if message.doubtful}


class Ledger:
    """All conversations, who is being answered where, and what was found wrong while it ran."""

    def __init__(self) -> None:
        self.conversations: list[Conversation] = []
        self.losses = Losses()
        self.in_flight: dict[int, tuple[Conversation, Message]] = {}
        self.foreign: list[str] = []
        self.out_of_order: list[str] = []
        self.doubled: list[str] = []
        self.left_over: list[str] = []
        self.unexpected: list[str] = []
        self.cancelled = 0
        self.resumed = 0
        self.repeated = 0
        self.looks = 0
        self.disk_stalls: dict[tuple[str, int], DiskStall] = {}

    def may_lack(self, conversation: Conversation, message: Message) -> bool:
        """Whether an answer may be gone with a master of Redis."""
        return self.losses.turn(conversation.session_id, message.turn_id, message.moment) is not None

    def safe(self, conversation: Conversation) -> list[Message]:
        """The answered messages that no fault may have taken along: in the order of their answers."""
        return [message for message in conversation.answered() if not self.may_lack(conversation, message)]

    def may_be_gone(self, conversation: Conversation) -> bool:
        """Whether nothing of the session is safe."""
        opened = conversation.opened
        return not self.safe(conversation) and (
            opened is None or self.losses.opening(conversation.session_id, opened) is not None
        )

    def may_be_open_again(self, conversation: Conversation) -> bool:
        """Whether that the session has ended, or was erased, may be gone with a master of Redis."""
        if conversation.closed is None:
            return False
        if conversation.erased:
            return self.losses.erasure(conversation.session_id, conversation.row_id, conversation.closed) is not None
        return self.losses.end(conversation.session_id, conversation.closed) is not None

    def may_be_strangers(self, conversation: Conversation) -> bool:
        """Whether that the session is bound to its user may be gone with a master of Redis."""
        return all(self.losses.user(conversation.session_id, message.moment) for message in conversation.bound())

    def found(self, kinds: Collection[str]) -> bool:
        """Whether a breach of one of these kinds has shown already."""
        return any(getattr(self, kind, ()) for kind in kinds)

    def on_pod(self, pod: int, now: float) -> set[str]:
        """The sessions with a message at a pod: in flight, or one whose asker went away lately without an answer."""
        found = {conversation.session_id for conversation, message in self.in_flight.values() if message.pod == pod}
        for conversation in self.conversations:
            if not conversation.over:
                for message in conversation.messages:
                    if any(where == pod and now - when < LEFT_BEHIND_S for when, _, where in message.failures):
                        found.add(conversation.session_id)
        return found

    def is_awaited(self, since: float) -> bool:
        """Whether somebody waits for an answer, and has done so from before that time on, with one message or several."""
        return any(conversation.waits()[-1][0].sent_at < since for conversation, _ in self.in_flight.values())

    def messages(self) -> list[tuple[Conversation, Message]]:
        return [(conversation, message) for conversation in self.conversations for message in conversation.messages]
