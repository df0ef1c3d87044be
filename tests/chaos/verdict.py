"""The verdict: compares what was answered with what Postgres and Redis hold after all is mended and drained.

What only a lost master had is counted apart, by the fault that took it: `losses.py` says what that may be. Everything else
that is missing was lost afterwards, with everything healthy or with its base in Postgres, and is a breach.
"""

import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from persistence.redis.keys import GROUP
from tests.chaos.graphs.recall import SECRET
from tests.chaos.ledger import Conversation, Ledger
from tests.chaos.losses import Loss
from tests.chaos.site import Site
from tests.support.rule import all_keys, breaches

SESSIONS = (
    "SELECT id, session_id, status, message_count, turns, minted, coalesce(external_user_id, '') AS user_id,"
    " context_data::text AS context,"
    " conversation_history::text AS history, agent_sessions::text AS whole FROM agent_sessions"
)
MESSAGES = (
    "SELECT session_id, role, content, turn, turn_id::text, seq, message_id, agent_messages::text AS whole"
    " FROM agent_messages ORDER BY session_id, seq"
)


@dataclass
class Verdict:
    """What is wrong, in words, by kind; empty lists everywhere are the promise kept. `with_master` is what was lost with a
    master, by fault: that is a breach only where nothing may be lost at all, and then it stands among `lost` too."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    out_of_order: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)
    with_master: dict[str, list[str]] = field(default_factory=dict)

    def kinds(self) -> dict[str, list[str]]:
        """All kinds of breach, with what was found."""
        return {kind: found for kind, found in vars(self).items() if kind != "with_master"}

    def breaches(self) -> dict[str, list[str]]:
        """The kinds with something wrong."""
        return {kind: found for kind, found in self.kinds().items() if found}

    def miss(self, what: str, loss: Loss | None) -> None:
        """Something that was answered is missing: lost with a master when there is such a loss, or else for no reason."""
        if loss is None:
            self.lost.append(what)
        else:
            self.with_master.setdefault(loss.fault, []).append(what)


async def check(site: Site, ledger: Ledger, *, drained: bool) -> Verdict:
    """Reads both stores whole."""
    verdict = Verdict(
        doubled=list(ledger.doubled),
        foreign=list(ledger.foreign),
        out_of_order=list(ledger.out_of_order),
        left_over=list(ledger.left_over),
        unexpected=list(ledger.unexpected),
    )
    connection = await asyncpg.connect(site.postgres.url)
    try:
        sessions = {row["session_id"]: row for row in await connection.fetch(SESSIONS)}
        messages: defaultdict[Any, list[asyncpg.Record]] = defaultdict(list)
        for row in await connection.fetch(MESSAGES):
            messages[row["session_id"]].append(row)
    finally:
        await connection.close()
    stored = dict(sessions)
    for conversation in ledger.conversations:
        session = sessions.pop(conversation.session_id, None)
        rows = messages.pop(session["id"], []) if session else []
        _check_conversation(verdict, ledger, conversation, session, rows)
    # A session that was opened and whose answer was lost has no messages, and nobody knows of it.
    for session_id, session in sessions.items():
        if session["message_count"] or messages.pop(session["id"], None):
            verdict.unexpected.append(f"{session_id} is in Postgres, and nobody has sent its messages")
    await _check_redis(verdict, site, ledger, stored, drained)
    if site.options.loses_nothing:
        verdict.lost += [f"{what}: lost with the master" for found in verdict.with_master.values() for what in found]
    return verdict


def _check_conversation(
    verdict: Verdict,
    ledger: Ledger,
    conversation: Conversation,
    session: asyncpg.Record | None,
    rows: list[asyncpg.Record],
) -> None:
    where = conversation.session_id
    if session is not None:
        _look_for_foreign(verdict, conversation, session, rows)
    questions = [row for row in rows if row["role"] == "user"]
    numbers = [int(row["content"].split()[1]) for row in questions]
    if conversation.erased:
        # What was still on its way then may have opened it anew; nothing else may be in it.
        if (session is not None and not conversation.doubtful()) or set(numbers) - conversation.doubtful():
            if ledger.may_be_open_again(conversation):
                verdict.miss(
                    f"{where} was erased, and is back with messages {numbers}", _loss_of_close(ledger, conversation)
                )
            else:
                verdict.unexpected.append(f"{where} was erased, and is in Postgres with messages {numbers}")
        return
    if session is None and conversation.opened is not None:
        verdict.miss(f"{where} was opened, and is not in Postgres", ledger.losses.opening(where, conversation.opened))
    if any(row["message_id"] != f"m{number}" for number, row in zip(numbers, questions, strict=True)):
        verdict.unexpected.append(f"{where} has messages under other ids than theirs")
    _check_order(verdict, where, rows)
    _check_turns(verdict, ledger, conversation, rows, numbers)
    if session is not None:
        _check_session(verdict, ledger, conversation, session, rows)


def _check_turns(
    verdict: Verdict, ledger: Ledger, conversation: Conversation, rows: list[asyncpg.Record], numbers: list[int]
) -> None:
    """Whether what was answered is stored, once, in order."""
    where = conversation.session_id
    sent = {message.number: message for message in conversation.messages}
    turns: defaultdict[int, list[tuple[str, str]]] = defaultdict(list)
    answers = {row["turn"]: row["content"] for row in rows if row["role"] == "assistant"}
    for number, row in zip(numbers, (row for row in rows if row["role"] == "user"), strict=True):
        turns[number].append((answers.get(row["turn"], ""), row["turn_id"]))
    for number, stored in turns.items():
        # An answer that was lost with its master, and given anew, may have come to Postgres after all.
        former = sent[number].former if number in sent else []
        times = len([turn for turn in stored if turn not in former])
        if times > 1 or len(stored) > len(set(stored)):
            verdict.doubled.append(f"{where} message {number} is in Postgres {len(stored)} times")
        if number not in sent:
            verdict.unexpected.append(f"{where} message {number} was never sent")
        elif sent[number].answer is None and sent[number].failures and not sent[number].doubtful:
            verdict.unexpected.append(f"{where} message {number} is stored and was refused: {sent[number].failures}")
    answered = conversation.answered()
    for message in answered:
        loss = ledger.losses.turn(where, message.turn_id, message.moment)
        if message.number not in turns:
            verdict.miss(f"{where} message {message.number} was answered and is not in Postgres", loss)
        elif (message.answer, message.turn_id) not in turns[message.number]:
            verdict.miss(
                f"{where} message {message.number} has another text, or another turn, in Postgres than was answered", loss
            )
    safe = [message.number for message in answered if not ledger.may_lack(conversation, message)]
    if [number for number in numbers if number in safe] != safe and set(safe) <= set(numbers):
        verdict.out_of_order.append(f"{where}: answered {safe}, stored {numbers}")


def _loss_of_close(ledger: Ledger, conversation: Conversation) -> Loss | None:
    """The loss with which it may be gone that the session has ended, or was erased."""
    if conversation.closed is None:
        return None
    if conversation.erased:
        return ledger.losses.erasure(conversation.session_id, conversation.row_id, conversation.closed)
    return ledger.losses.end(conversation.session_id, conversation.closed)


def _check_order(verdict: Verdict, where: str, rows: list[asyncpg.Record]) -> None:
    if [row["role"] for row in rows] != ["user", "assistant"] * (len(rows) // 2):
        verdict.out_of_order.append(f"{where}: questions and answers do not alternate")
    if [row["seq"] for row in rows] != list(range(1, len(rows) + 1)) or len(rows) % 2:
        verdict.out_of_order.append(f"{where}: the messages are numbered {[row['seq'] for row in rows]}")
    if [row["turn"] for row in rows] != [1 + index // 2 for index in range(len(rows))]:
        verdict.out_of_order.append(f"{where}: the turns are numbered {[row['turn'] for row in rows]}")


def _check_session(
    verdict: Verdict, ledger: Ledger, conversation: Conversation, session: asyncpg.Record, rows: list[asyncpg.Record]
) -> None:
    where = conversation.session_id
    if session["message_count"] != len(rows) or session["turns"] != len(rows) // 2:
        verdict.out_of_order.append(f"{where} counts {session['message_count']} messages and has {len(rows)}")
    lacking = len(conversation.answered()) - len(ledger.safe(conversation))
    known = json.loads(session["context"]).get("turns", 0)
    # Of turns that came back behind others, those did not know yet when they stored the context.
    if rows and not len(rows) // 2 - lacking <= known <= len(rows) // 2:
        verdict.out_of_order.append(f"{where}: its context is {session['context']}, its turns are {len(rows) // 2}")
    if session["minted"] != bool(conversation.token):
        verdict.unexpected.append(f"{where} has lost its token, or has got one: minted is {session['minted']}")
    if session["status"] != ("ended" if conversation.ended else "active"):
        what = f"{where} is {session['status']}; that it has ended was {conversation.ended}"
        verdict.miss(what, _loss_of_close(ledger, conversation) if session["status"] == "active" else None)
    elif conversation.ended:
        history = [(one["role"], one["content"]) for one in json.loads(session["history"])]
        if history != [(row["role"], row["content"]) for row in rows]:
            verdict.lost.append(f"{where} has {len(rows)} messages and others in its conversation_history")
    if bound := conversation.bound():
        if session["user_id"] != conversation.user:
            loss = ledger.losses.user(where, bound[-1].moment) if ledger.may_be_strangers(conversation) else None
            verdict.miss(f"{where} belongs to {conversation.user}, in Postgres to {session['user_id'] or 'nobody'}", loss)
    elif session["user_id"] and not (conversation.user == session["user_id"] and conversation.doubtful()):
        verdict.unexpected.append(f"{where} is nobody's, and belongs to {session['user_id']} in Postgres")


def _look_for_foreign(
    verdict: Verdict, conversation: Conversation, session: asyncpg.Record, rows: list[asyncpg.Record]
) -> None:
    where = conversation.session_id
    everything = " ".join(row["whole"] for row in (session, *rows))
    for secret in set(SECRET.findall(everything)) - {conversation.secret}:
        verdict.foreign.append(f"{where} holds {secret} in Postgres")


async def _check_redis(
    verdict: Verdict, site: Site, ledger: Ledger, stored: Mapping[str, asyncpg.Record], drained: bool
) -> None:
    store = site.store
    records, pending = await store.waiting()
    if not drained or records or pending:
        verdict.left_over.append(f"{records} records on the outbox, {pending} of them pending")
    for partition in await store.partitions():
        dead: Any = await store.client.xrange(store.keys.dead(partition))
        verdict.left_over += [f"dead letter {entry.decode()}: {fields[b'reason'].decode()}" for entry, fields in dead]
    verdict.left_over += await breaches(store.client, store.keys)
    gone = site.logged("outbox.deleted_while_pending")
    claims = await store.of_outboxes(lambda outbox: store.client.xautoclaim(outbox, GROUP, "verdict", 0, "0-0"))
    if not claims:
        verdict.left_over.append("the outbox, or its group, is gone")
    gone += sum(len(claimed[2]) for claimed in claims)
    if gone:
        verdict.left_over.append(f"{gone} entries were deleted while a worker had them")
    running = await store.running()
    if running:
        verdict.left_over.append(f"{running} turns still hold their sessions")
    owners = {conversation.session_id: conversation for conversation in ledger.conversations}
    for key in await all_keys(store.client, store.keys):
        if ":session:" in key:
            fields: Any = await store.client.hgetall(key)
            if not fields:
                # Its time ran out while the others were looked at; what it said is compared with Postgres by itself.
                continue
            values = b" ".join(fields.values()).decode()
            session_id = key.partition(":session:")[2]
            hot = [int(fields.get(name) or -1) for name in (b"turns", b"flushed")]
            if session_id not in stored or hot != [stored[session_id]["turns"]] * 2:
                verdict.lost.append(f"{session_id} has other turns in Redis than in Postgres: {hot}")
        elif ":events:" in key:
            entries: Any = await store.client.xrange(key)
            values = b" ".join(entry[b"events"] for _, entry in entries).decode()
            session_id = entries[0][1][b"session"].decode() if entries else ""
        else:
            continue
        own = {owners[session_id].secret} if session_id in owners else set()
        for secret in set(SECRET.findall(values)) - own:
            verdict.foreign.append(f"{session_id} holds {secret} in Redis")
        owner = owners.get(session_id)
        if owner is not None and owner.erased and not owner.doubtful() and not ledger.may_be_open_again(owner):
            verdict.unexpected.append(f"{session_id} was erased, and Redis has {key}")
