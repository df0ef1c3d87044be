"""Rows and columns: conversion of sessions, turns and messages to and from what asyncpg takes and gives."""

from collections.abc import Collection, Iterable, Sequence
from datetime import datetime
from typing import Any

import asyncpg
import msgspec

from persistence.errors import Damaged
from persistence.model.agents import Agent, decode_definition
from persistence.model.codec import unreadable
from persistence.model.fields import SESSION_FIELDS, Column, Field, SessionFields
from persistence.model.ids import masked
from persistence.model.kinds import encode_object
from persistence.model.session import Message, Record, Session, StoredMessage, Turn
from persistence.model.times import iso_from, moment

Columns = tuple[list[Any], ...]


def _column(values: list[Any]) -> list[Any]:
    """A column for `unnest`, which pads shorter ones with NULLs: one of NULLs alone need not be sent."""
    return values if any(value is not None for value in values) else []


def session_columns(sessions: Collection[Session], fields: SessionFields = SESSION_FIELDS) -> Columns:
    """The columns of sessions, in the order of `fields.columns`."""
    return tuple(_session_column(sessions, column, field) for column, field in fields.columns)


def _session_column(sessions: Iterable[Session], column: Column, field: Field) -> list[Any]:
    name, convert = field.name, column.pick or field.kind.to_row
    if column.null is None:
        values = [convert(getattr(session, name)) for session in sessions]
    else:
        null = field.kind.read(column.null)
        of_sessions = [getattr(session, name) for session in sessions]
        values = [None if value == null else convert(value) for value in of_sessions]
    return _column(values)


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


def session_of(row: asyncpg.Record, fields: SessionFields = SESSION_FIELDS) -> Session:
    """A session from a row of `session_headers`. Raises Damaged, naming the column, or the field that is missing."""
    return fields.struct(**{field.name: _member(row, field) for field in fields.header})


def _member(row: asyncpg.Record, field: Field) -> Any:
    # The view of a database that is not migrated yet lacks the field.
    value = row.get(field.name)
    if value is not None:
        try:
            return field.kind.from_row(value)
        except msgspec.DecodeError as error:
            raise Damaged(f"row {row['id']}", field.columns[0].name, unreadable(error)) from error
    if field.null is None:
        raise Damaged(f"row {row['id']}", field.name, "is missing")
    return field.kind.read(field.null)


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
    """The turns of a session from `first` on, from their messages. Raises Damaged when a turn or a message is missing."""
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
