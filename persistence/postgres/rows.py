"""Rows and columns: stored values as Postgres has them."""

from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

import asyncpg
import msgspec

from persistence.errors import Damaged
from persistence.model.agents import Agent, decode_definition
from persistence.model.codec import encode_object, unreadable
from persistence.model.ids import as_uuid, masked
from persistence.model.session import Message, Record, Session, StoredMessage, Turn
from persistence.model.times import iso_from, moment

Columns = tuple[list[Any], ...]


def _column(values: list[Any]) -> list[Any]:
    """A column for `unnest`, which fills up shorter ones with nulls: one of nulls alone need not be sent."""
    return values if any(value is not None for value in values) else []


def session_columns(sessions: Iterable[Session]) -> Columns:
    # Only the canonical form comes back as it was: 32 hex digits are somebody else's kind of id.
    users = [(s.user_id, None) if as_uuid(s.user_id) == s.user_id else (None, s.user_id or None) for s in sessions]
    return (
        [s.id for s in sessions],
        [s.session_id for s in sessions],
        [s.agent_id for s in sessions],
        _column([user_uuid for user_uuid, _ in users]),
        _column([external for _, external in users]),
        [s.website_domain or None for s in sessions],
        [s.ip_address or None for s in sessions],
        [s.user_agent or None for s in sessions],
        [s.channel for s in sessions],
        [s.status for s in sessions],
        [moment(s.started_at) for s in sessions],
        [moment(s.last_activity_at) for s in sessions],
        _column([moment(s.ended_at) if s.ended_at else None for s in sessions]),
        [encode_object(s.context) for s in sessions],
        [encode_object(s.metadata) for s in sessions],
        [s.minted for s in sessions],
        [s.turns for s in sessions],
        [s.revision for s in sessions],
    )


def message_columns(records: Sequence[Record]) -> Columns:
    turns = [(r.session.id, int(r.fact.removeprefix("t:")), r.turn) for r in records if r.turn]
    # Each message with its turn, the turn's number, the session, and its place in the turn.
    all_of = [(m, t, number, of, i) for of, number, t in turns for i, m in enumerate(t.messages)]
    messages = [m for m, *_ in all_of]
    return (
        [m.id for m in messages],
        [of for _, _, _, of, _ in all_of],
        [m.role for m in messages],
        [m.content for m in messages],
        _column([m.audio_url for m in messages]),
        _column([m.audio_duration_ms for m in messages]),
        _column([m.tokens_used for m in messages]),
        _column([m.latency_ms for m in messages]),
        _column([m.model_used for m in messages]),
        _column([None if m.metadata is None else encode_object(m.metadata) for m in messages]),
        [t.id for _, t, _, _, _ in all_of],
        [number for _, _, number, _, _ in all_of],
        [t.seq + i for _, t, _, _, i in all_of],
        _column([t.message_id if m.role == "user" else None for m, t, _, _, _ in all_of]),
        [encode_object(t.metadata) if i == len(t.messages) - 1 else None for _, t, _, _, i in all_of],
        [moment(m.created_at) for m in messages],
    )


def _text(at: datetime | None) -> str:
    return iso_from(at) if at else ""


def session_of(row: asyncpg.Record) -> Session:
    return Session(
        id=str(row["id"]),
        session_id=row["session_id"],
        agent_id=str(row["agent_id"]),
        channel=row["channel"],
        status=row["status"],
        user_id=row["user_id"],
        website_domain=row["website_domain"],
        ip_address=row["ip_address"],
        user_agent=row["user_agent"],
        started_at=_text(row["started_at"]),
        last_activity_at=_text(row["last_activity_at"]),
        ended_at=_text(row["ended_at"]),
        message_count=row["message_count"],
        context=_object(row["context"], row, "context_data"),
        metadata=_object(row["metadata"], row, "metadata"),
        minted=row["minted"],
        turns=row["turns"],
        revision=row["revision"],
    )


def _object(raw: str, row: asyncpg.Record, field: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(raw, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise Damaged(f"row {row['id']}", field, unreadable(error)) from error


def _message(row: asyncpg.Record) -> dict[str, Any]:
    return {
        "id": str(row["id"]),
        "role": row["role"],
        "content": row["content"],
        "created_at": _text(row["created_at"]),
        "audio_url": row["audio_url"],
        "audio_duration_ms": row["audio_duration_ms"],
        "tokens_used": row["tokens_used"],
        "latency_ms": row["latency_ms"],
        "model_used": row["model_used"],
        "metadata": None if row["metadata"] is None else _object(row["metadata"], row, "metadata"),
    }


def stored_message_of(row: asyncpg.Record) -> StoredMessage:
    return StoredMessage(
        **_message(row), seq=row["seq"], turn_id=str(row["turn_id"]), turn=row["turn"], message_id=row["message_id"]
    )


def turns_of(rows: Sequence[asyncpg.Record], first: int, session: Session) -> list[Turn]:
    """The turns that the rows belong to. Raises Damaged when one is missing: what Redis hydrates has no holes."""
    by_number: dict[int, list[asyncpg.Record]] = {}
    for row in rows:
        by_number.setdefault(row["turn"], []).append(row)
    turns = []
    seq = session.message_count - len(rows) + 1
    for number in range(first, session.turns + 1):
        if number not in by_number:
            raise Damaged(f"session {masked(session.session_id)}", f"turn {number}", "is missing in Postgres")
        of_turn = by_number[number]
        if of_turn[0]["seq"] != seq or of_turn[-1]["seq"] != seq + len(of_turn) - 1:
            raise Damaged(f"session {masked(session.session_id)}", f"turn {number}", "lacks a message in Postgres")
        seq += len(of_turn)
        raw = of_turn[-1]["turn_metadata"]
        turns.append(
            Turn(
                id=str(of_turn[0]["turn_id"]),
                message_id=of_turn[0]["message_id"],
                seq=of_turn[0]["seq"],
                messages=[Message(**_message(row)) for row in of_turn],
                metadata=_object(raw, of_turn[-1], "turn_metadata") if raw else {},
            )
        )
    return turns


def agent_of(row: asyncpg.Record) -> Agent:
    return Agent(str(row["id"]), row["name"], decode_definition(row["definition"], f"agent {row['name']}"))
