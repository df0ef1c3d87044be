"""Postgres: what is kept for good. Written by the worker and the admin API, read when a session is not in Redis.

Works behind PgBouncer in transaction mode: no prepared statement, lock or setting outlives its transaction, and every
statement runs inside one.
"""

import asyncio
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime
from typing import Any
from uuid import UUID

import asyncpg
import msgspec

from persistence.agents import Agent, as_uuid, decode_definition
from persistence.errors import Damaged, DataRefused, PostgresUnavailable
from persistence.keys import masked
from persistence.records import (
    Message,
    Record,
    Session,
    StoredMessage,
    Turn,
    encode_object,
    iso_from,
    moment,
    unreadable,
)
from persistence.sessions import Snapshot
from persistence.statements import load_statements

Connection = asyncpg.pool.PoolConnectionProxy
Columns = tuple[list[Any], ...]

REFUSED = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
    ValueError,
    OverflowError,
)
"""The data's own fault. Everything else (the connection, the server's state, a schema of another version) can pass, and
must never put a good record among the dead letters."""


UNREACHABLE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""What is not the data's fault. A time-out is an OSError."""


TELLING = frozenset(("08", "28", "3D", "42", "53", "55", "57"))
"""Classes of errors whose text names connections, roles, databases, tables and limits, and no values (PostgreSQL, appendix
A). Any other may quote a row."""


def _reason(error: Exception) -> str:
    """An error in words that can be logged: nothing of a row, and nothing of the URL."""
    kind = type(error).__name__
    if isinstance(error, asyncpg.PostgresError):
        state = str(error.sqlstate or "")
        return f"{kind}: {error.args[0]}" if state[:2] in TELLING and error.args else f"{kind} {state}".strip()
    if isinstance(error, (ValueError, OverflowError)):
        return f"{kind}: GATEWAY_DATABASE_URL cannot be used"
    return f"{kind}: {error}"


class SessionFilter(msgspec.Struct, frozen=True):
    """Which sessions a list is about; None is any."""

    agent_id: str | None = None
    status: str | None = None
    website_domain: str | None = None
    channel: str | None = None

    def matches(self, session: Session) -> bool:
        return (
            self.agent_id in (None, session.agent_id)
            and self.status in (None, session.status)
            and self.website_domain in (None, session.website_domain)
            and self.channel in (None, session.channel)
        )


class Totals(msgspec.Struct):
    sessions: int
    active: int
    messages: int


class Postgres:
    """A pool of connections that opens on first use, so that a pod starts while Postgres is down."""

    def __init__(self, url: str, *, connections: int = 4, timeout_s: float = 1.5) -> None:
        self._url = url
        self._connections = connections
        self._timeout_s = timeout_s
        self._pool: asyncpg.Pool | None = None
        self._opening = asyncio.Lock()
        self._statements = load_statements()

    async def close(self) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    @asynccontextmanager
    async def transaction(self, timeout_s: float | None = None) -> AsyncIterator["Transaction"]:
        """One transaction, bounded in time. Raises PostgresUnavailable or DataRefused."""
        try:
            async with self._connection(timeout_s or self._timeout_s) as connection, connection.transaction():
                yield Transaction(connection, self._statements)
        except REFUSED as error:
            constraint = getattr(error, "constraint_name", None) or ""
            raise DataRefused(f"{type(error).__name__} {constraint}".strip(), constraint) from error
        except UNREACHABLE as error:
            raise PostgresUnavailable(_reason(error)) from error

    @asynccontextmanager
    async def _connection(self, timeout_s: float) -> AsyncIterator[Connection]:
        """A connection for a time. When the time is over it is cut off: a server that hangs would not even hear of a
        rollback, and asyncpg waits for that without a limit. Raises PostgresUnavailable when there is none to be had."""
        async with asyncio.timeout(timeout_s) as limit:
            try:
                pool = await self._open()
                connection = await pool.acquire()
            except (*UNREACHABLE, ValueError, OverflowError) as error:
                raise PostgresUnavailable(_reason(error)) from error
            when = limit.when()
            assert when is not None
            cut_off = asyncio.get_running_loop().call_at(when - 0.001, connection.terminate)
            try:
                yield connection
            finally:
                cut_off.cancel()
                await pool.release(connection, timeout=1)

    async def _open(self) -> asyncpg.Pool:
        async with self._opening:
            if self._pool is None:
                pool = asyncpg.create_pool(
                    self._url,
                    min_size=0,
                    max_size=self._connections,
                    statement_cache_size=0,
                    timeout=self._timeout_s,
                    server_settings={"application_name": "gateway"},
                    reset=_nothing_to_reset,
                )
                self._pool = await pool
            return self._pool

    async def migrated_to(self) -> int:
        """The number of the newest migration applied. Raises PostgresUnavailable."""
        async with self.transaction() as transaction:
            return int((await transaction.fetch("ping"))[0][0])

    async def find_session(self, session_id: str) -> Session | None:
        async with self.transaction() as transaction:
            return await transaction.find_session(session_id)

    async def find_snapshot(self, session_id: str, hot_turns: int) -> Snapshot | None:
        """A session with up to `hot_turns` of its newest turns."""
        async with self.transaction() as transaction:
            return await transaction.find_snapshot(session_id, hot_turns)

    async def load_messages(self, session_uuid: str, before: int, limit: int) -> list[StoredMessage]:
        """Up to `limit` messages with a number below `before`, oldest first."""
        async with self.transaction() as transaction:
            rows = await transaction.fetch("load_messages", UUID(session_uuid), before, limit)
            return [_stored_message(row) for row in reversed(rows)]

    async def list_sessions(self, which: SessionFilter, after: tuple[str, str] | None, limit: int) -> list[Session]:
        """Sessions by last activity, newest first, from behind `after` (last_activity_at, session_id)."""
        async with self.transaction() as transaction:
            rows = await transaction.fetch(
                "list_sessions",
                UUID(which.agent_id) if which.agent_id else None,
                which.status,
                which.website_domain,
                which.channel,
                moment(after[0]) if after else None,
                after[1] if after else None,
                limit,
            )
            return [_session(row) for row in rows]

    async def totals(self, agent_id: str | None, left_out: Sequence[str]) -> Totals:
        """Totals over an agent's sessions (None: all), but for those left out."""
        async with self.transaction(5) as transaction:
            row = (await transaction.fetch("session_stats", UUID(agent_id) if agent_id else None, list(left_out)))[0]
            return Totals(row["total_sessions"], row["active_sessions"], row["messages"])

    async def put_agent(self, agent: Agent) -> None:
        """Creates the agent or replaces it. Raises DataRefused when its name is another one's."""
        async with self.transaction() as transaction:
            definition = msgspec.json.encode(agent.definition).decode()
            await transaction.fetch("put_agent", UUID(agent.id), agent.name, definition)

    async def find_agent(self, reference: str) -> Agent | None:
        """An agent by UUID or name."""
        agent_id = as_uuid(reference)
        async with self.transaction() as transaction:
            rows = await transaction.fetch("find_agent", UUID(agent_id) if agent_id else None, reference)
            return _agent(rows[0]) if rows else None

    async def list_agents(self) -> list[Agent]:
        async with self.transaction() as transaction:
            return [_agent(row) for row in await transaction.fetch("list_agents")]

    async def delete_agent(self, agent_id: str) -> None:
        async with self.transaction() as transaction:
            await transaction.fetch("delete_agent", UUID(agent_id))


class Transaction:
    """The statements of one transaction."""

    def __init__(self, connection: Connection, statements: dict[str, str]) -> None:
        self._connection = connection
        self._statements = statements

    async def fetch(self, name: str, *arguments: Any) -> list[asyncpg.Record]:
        """Runs the statement of that name."""
        return await self._connection.fetch(self._statements[name], *arguments)

    async def run(self, sql: str) -> None:
        """Runs a script of several statements, such as a migration."""
        await self._connection.execute(sql)

    async def find_session(self, session_id: str) -> Session | None:
        rows = await self.fetch("find_session", session_id)
        return _session(rows[0]) if rows else None

    async def find_snapshot(self, session_id: str, hot_turns: int) -> Snapshot | None:
        """A session with up to `hot_turns` of its newest turns."""
        session = await self.find_session(session_id)
        if session is None:
            return None
        first = max(1, session.turns - hot_turns + 1)
        rows = await self.fetch("load_turns", UUID(session.id), first)
        return Snapshot(session, first, _turns(rows, first, session))

    async def flush(self, records: Sequence[Record]) -> None:
        """Brings the records into the tables. Flushing a record again changes nothing."""
        erased = [UUID(record.session.id) for record in records if record.session.status == "erased"]
        kept = [record for record in records if record.session.status != "erased"]
        await self.fetch("lock_erase" if erased else "lock_flush")
        if erased:
            await self.fetch("erase_sessions", erased)
        if not kept:
            return
        newest: dict[str, Session] = {}
        for record in kept:
            known = newest.get(record.session.id)
            if known is None or known.revision < record.session.revision:
                newest[record.session.id] = record.session
        changed = await self.fetch("flush", *_session_columns(newest.values()), *_message_columns(kept))
        if changed:
            await self.fetch("write_histories", [row["id"] for row in changed])


async def _nothing_to_reset(connection: asyncpg.Connection) -> None:
    """In place of the statements that asyncpg runs each time a connection goes back to the pool: nothing outlives its
    transaction."""


def _column(values: list[Any]) -> list[Any]:
    """A column for `unnest`, which fills up shorter ones with nulls: one of nulls alone need not be sent."""
    return values if any(value is not None for value in values) else []


def _session_columns(sessions: Iterable[Session]) -> Columns:
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


def _message_columns(records: Sequence[Record]) -> Columns:
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


def _session(row: asyncpg.Record) -> Session:
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


def _stored_message(row: asyncpg.Record) -> StoredMessage:
    return StoredMessage(
        **_message(row), seq=row["seq"], turn_id=str(row["turn_id"]), turn=row["turn"], message_id=row["message_id"]
    )


def _turns(rows: Sequence[asyncpg.Record], first: int, session: Session) -> list[Turn]:
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


def _agent(row: asyncpg.Record) -> Agent:
    return Agent(str(row["id"]), row["name"], decode_definition(row["definition"], f"agent {row['name']}"))
