"""The verdict: compares what was answered with what Postgres and Redis hold after all is mended and drained."""

import json
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import asyncpg

from persistence.redis.keys import GROUP
from tests.chaos.graphs.recall import SECRET
from tests.chaos.ledger import Conversation, Ledger
from tests.chaos.site import Site, of_group
from tests.support.rule import all_keys, breaches

SESSIONS = (
    "SELECT id, session_id, status, message_count, turns, minted, context_data::text AS context,"
    " conversation_history::text AS history, agent_sessions::text AS whole FROM agent_sessions"
)
MESSAGES = (
    "SELECT session_id, role, content, turn, turn_id::text, seq, message_id, agent_messages::text AS whole"
    " FROM agent_messages ORDER BY session_id, seq"
)


@dataclass
class Verdict:
    """What is wrong, in words, by kind; empty lists everywhere are the promise kept."""

    lost: list[str] = field(default_factory=list)
    doubled: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)
    out_of_order: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    slow: list[str] = field(default_factory=list)

    def breaches(self) -> dict[str, list[str]]:
        """The kinds with something wrong."""
        return {kind: found for kind, found in vars(self).items() if found}


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
        _check_conversation(verdict, conversation, session, rows)
    # A session that was opened and whose answer was lost has no messages, and nobody knows of it.
    for session_id, session in sessions.items():
        if session["message_count"] or messages.pop(session["id"], None):
            verdict.unexpected.append(f"{session_id} is in Postgres, and nobody has sent its messages")
    await _check_redis(verdict, site, ledger, stored, drained)
    return verdict


def _check_conversation(
    verdict: Verdict, conversation: Conversation, session: asyncpg.Record | None, rows: list[asyncpg.Record]
) -> None:
    where = conversation.session_id
    if session is not None:
        _look_for_foreign(verdict, conversation, session, rows)
    questions = [row for row in rows if row["role"] == "user"]
    numbers = [int(row["content"].split()[1]) for row in questions]
    turn_ids = {number: row["turn_id"] for number, row in zip(numbers, questions, strict=True)}
    if conversation.erased:
        # What was still on its way then may have opened it anew; nothing else may be in it.
        if (session is not None and not conversation.doubtful()) or set(numbers) - conversation.doubtful():
            verdict.unexpected.append(f"{where} was erased, and is in Postgres with messages {numbers}")
        return
    if session is None and conversation.token:
        verdict.lost.append(f"{where} was opened, and is not in Postgres")
    answers = {row["turn"]: row["content"] for row in rows if row["role"] == "assistant"}
    texts = {number: answers.get(row["turn"]) for number, row in zip(numbers, questions, strict=True)}
    if any(row["message_id"] != f"m{number}" for number, row in zip(numbers, questions, strict=True)):
        verdict.unexpected.append(f"{where} has messages under other ids than theirs")
    _check_order(verdict, where, rows)
    sent = {message.number: message for message in conversation.messages}
    for number, times in Counter(numbers).items():
        if times > 1:
            verdict.doubled.append(f"{where} message {number} is in Postgres {times} times")
        if number not in sent:
            verdict.unexpected.append(f"{where} message {number} was never sent")
        elif sent[number].answer is None and sent[number].failures and not sent[number].doubtful:
            verdict.unexpected.append(f"{where} message {number} is stored and was refused: {sent[number].failures}")
    for message in conversation.answered():
        if message.number not in texts:
            verdict.lost.append(f"{where} message {message.number} was answered and is not in Postgres")
        elif (texts[message.number], turn_ids[message.number]) != (message.answer, message.turn_id):
            verdict.lost.append(
                f"{where} message {message.number} has another text, or another turn, in Postgres than was answered"
            )
    answered = [message.number for message in conversation.answered()]
    if [number for number in numbers if number in answered] != answered and set(answered) <= set(numbers):
        verdict.out_of_order.append(f"{where}: answered {answered}, stored {numbers}")
    if session is not None:
        _check_session(verdict, conversation, session, rows)


def _check_order(verdict: Verdict, where: str, rows: list[asyncpg.Record]) -> None:
    if [row["role"] for row in rows] != ["user", "assistant"] * (len(rows) // 2):
        verdict.out_of_order.append(f"{where}: questions and answers do not alternate")
    if [row["seq"] for row in rows] != list(range(1, len(rows) + 1)) or len(rows) % 2:
        verdict.out_of_order.append(f"{where}: the messages are numbered {[row['seq'] for row in rows]}")
    if [row["turn"] for row in rows] != [1 + index // 2 for index in range(len(rows))]:
        verdict.out_of_order.append(f"{where}: the turns are numbered {[row['turn'] for row in rows]}")


def _check_session(
    verdict: Verdict, conversation: Conversation, session: asyncpg.Record, rows: list[asyncpg.Record]
) -> None:
    where = conversation.session_id
    if session["message_count"] != len(rows) or session["turns"] != len(rows) // 2:
        verdict.out_of_order.append(f"{where} counts {session['message_count']} messages and has {len(rows)}")
    if rows and json.loads(session["context"])["turns"] != len(rows) // 2:
        verdict.out_of_order.append(f"{where}: its context is {session['context']}, its turns are {len(rows) // 2}")
    if session["minted"] != bool(conversation.token):
        verdict.unexpected.append(f"{where} has lost its token, or has got one: minted is {session['minted']}")
    if session["status"] != ("ended" if conversation.ended else "active"):
        verdict.lost.append(f"{where} is {session['status']}; that it has ended was {conversation.ended}")
    elif conversation.ended:
        history = [(one["role"], one["content"]) for one in json.loads(session["history"])]
        if history != [(row["role"], row["content"]) for row in rows]:
            verdict.lost.append(f"{where} has {len(rows)} messages and others in its conversation_history")


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
    records, pending = await site.waiting()
    if not drained or records or pending:
        verdict.left_over.append(f"{records} records on the outbox, {pending} of them pending")
    dead: Any = await site.client.xrange(site.keys.dead(0))
    verdict.left_over += [f"dead letter {entry.decode()}: {fields[b'reason'].decode()}" for entry, fields in dead]
    verdict.left_over += await breaches(site.client, site.keys)
    gone = site.logged("outbox.deleted_while_pending")
    claimed = await of_group(site.client.xautoclaim(site.keys.outbox(0), GROUP, "verdict", 0, "0-0"))
    if claimed is None:
        verdict.left_over.append("the outbox, or its group, is gone")
    else:
        gone += len(claimed[2])
    if gone:
        verdict.left_over.append(f"{gone} entries were deleted while a worker had them")
    running = await site.client.zcard(site.keys.running(0))
    if running:
        verdict.left_over.append(f"{running} turns still hold their sessions")
    owners = {conversation.session_id: conversation for conversation in ledger.conversations}
    for key in await all_keys(site.client, site.keys):
        if ":session:" in key:
            fields: Any = await site.client.hgetall(key)
            if not fields:
                # Its time ran out while the others were looked at; what it said is compared with Postgres by itself.
                continue
            values = b" ".join(fields.values()).decode()
            session_id = key.partition(":session:")[2]
            hot = [int(fields.get(name) or -1) for name in (b"turns", b"flushed")]
            if session_id not in stored or hot != [stored[session_id]["turns"]] * 2:
                verdict.lost.append(f"{session_id} has other turns in Redis than in Postgres: {hot}")
        elif ":events:" in key:
            entries: Any = await site.client.xrange(key)
            values = b" ".join(entry[b"events"] for _, entry in entries).decode()
            session_id = entries[0][1][b"session"].decode() if entries else ""
        else:
            continue
        own = {owners[session_id].secret} if session_id in owners else set()
        for secret in set(SECRET.findall(values)) - own:
            verdict.foreign.append(f"{session_id} holds {secret} in Redis")
        if session_id in owners and owners[session_id].erased and not owners[session_id].doubtful():
            verdict.unexpected.append(f"{session_id} was erased, and Redis has {key}")
