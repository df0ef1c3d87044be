"""Postgres: the durable store. Written by the worker and the admin API, read when a session is not in Redis.

Works behind PgBouncer in transaction mode: every statement runs inside a transaction, and no prepared statement, lock or
setting outlives one."""

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal
from uuid import UUID

import asyncpg
import msgspec
from asyncpg.connect_utils import SessionAttribute

from persistence.errors import DataRefused, PostgresUnavailable
from persistence.model.agents import Agent
from persistence.model.fields import SESSION_FIELDS, SessionFields
from persistence.model.ids import as_uuid
from persistence.model.session import Record, Session, Snapshot, StoredMessage
from persistence.model.times import moment
from persistence.postgres.rows import agent_of, message_columns, session_columns, session_of, stored_message_of, turns_of
from persistence.postgres.statements import load_statements

Connection = asyncpg.pool.PoolConnectionProxy

REFUSED = (
    asyncpg.DataError,
    asyncpg.IntegrityConstraintViolationError,
    asyncpg.ProgramLimitExceededError,
    ValueError,
    OverflowError,
)
"""Errors of the data itself. Any other (of the connection, the server's state, another version's schema) is temporary, and
must never make a dead letter of a good record."""

UNREACHABLE = (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError)
"""Errors that are not the data's. TimeoutError is an OSError."""

TELLING = frozenset(("08", "28", "3D", "42", "53", "55", "57"))
"""SQLSTATE classes whose messages name connections, roles, databases, tables and limits, but no values (PostgreSQL,
appendix A). Messages of other classes may quote a row."""


def _reason(error: Exception) -> str:
    """An error in words that can be logged, without values of a row or parts of the URL."""
    kind = type(error).__name__
    if isinstance(error, asyncpg.PostgresError):
        state = str(error.sqlstate or "")
        return f"{kind}: {error.args[0]}" if state[:2] in TELLING and error.args else f"{kind} {state}".strip()
    if isinstance(error, (ValueError, OverflowError)):
        return f"{kind}: GATEWAY_DATABASE_URL cannot be used"
    return f"{kind}: {error}"


class SessionFilter(msgspec.Struct, frozen=True):
    """Restricts a list of sessions; None matches any."""

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


class Forgotten(msgspec.Struct, frozen=True):
    """A session of which Redis has forgotten a final fact that Postgres knows. `id` is its UUID."""

    session_id: str
    id: str
    what: Literal["erased", "ended", "user"]


class Totals(msgspec.Struct):
    sessions: int
    active: int
    messages: int


class Postgres:
    """A pool of connections that opens on first use, so that a pod starts while Postgres is down."""

    def __init__(
        self, url: str, *, connections: int = 4, timeout_s: float = 1.5, fields: SessionFields = SESSION_FIELDS
    ) -> None:
        self._url = url
        self._connections = connections
        self._timeout_s = timeout_s
        self._pool: asyncpg.Pool | None = None
        self._opening = asyncio.Lock()
        self._fields = fields
        self.statements = load_statements(fields)

    async def close(self) -> None:
        if self._pool is not None:
            self._pool.terminate()
            self._pool = None

    @asynccontextmanager
    async def transaction(self, timeout_s: float | None = None) -> AsyncIterator["Transaction"]:
        """One transaction, bounded in time. Raises PostgresUnavailable or DataRefused."""
        try:
            async with self._connection(timeout_s or self._timeout_s) as connection, connection.transaction():
                yield Transaction(connection, self.statements, self._fields)
        except REFUSED as error:
            constraint = getattr(error, "constraint_name", None) or ""
            raise DataRefused(f"{type(error).__name__} {constraint}".strip(), constraint) from error
        except UNREACHABLE as error:
            if isinstance(error, asyncpg.ReadOnlySQLTransactionError) and self._pool is not None:
                # The server takes no writes any more, another one may: no connection is kept.
                await self._pool.expire_connections()
            raise PostgresUnavailable(_reason(error)) from error

    @asynccontextmanager
    async def _connection(self, timeout_s: float) -> AsyncIterator[Connection]:
        """A connection for `timeout_s`, which is then terminated: asyncpg would wait without limit for a server that hangs
        to roll back. Raises PostgresUnavailable when none can be had."""
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
                    # What a standby has may be older than what was acknowledged.
                    target_session_attrs=SessionAttribute.primary,
                )
                self._pool = await pool
            return self._pool

    async def migrated_to(self) -> int:
        """The number of the newest migration applied. Raises PostgresUnavailable."""
        async with self.transaction() as transaction:
            return int((await transaction.fetch("ping"))[0][0])

    async def is_writable(self) -> bool:
        """Whether the server takes writes. Raises PostgresUnavailable."""
        async with self.transaction() as transaction:
            return bool((await transaction.fetch("is_writable"))[0]["writable"])

    async def load_marks(self) -> dict[int, tuple[int, int]]:
        """Of each partition that Postgres has records of: the newest epoch, and the newest fence of a turn."""
        async with self.transaction() as transaction:
            rows = await transaction.fetch("load_marks")
        return {row["partition"]: (row["epoch"], row["fence"]) for row in rows}

    async def raise_marks(self, epochs: Mapping[int, int]) -> None:
        """Notes the epochs that partitions have begun."""
        partitions = sorted(epochs)
        async with self.transaction() as transaction:
            await transaction.fetch("raise_marks", partitions, [epochs[partition] for partition in partitions])

    async def find_session(self, session_id: str) -> Session | None:
        async with self.transaction() as transaction:
            return await transaction.find_session(session_id)

    async def erased_ids(self, ids: Collection[str]) -> set[str]:
        """Those of some sessions' ids that have been erased."""
        async with self.transaction() as transaction:
            return await transaction.erased_ids(ids)

    async def find_snapshot(self, session_id: str, hot_turns: int) -> Snapshot | None:
        """A session with up to `hot_turns` of its newest turns."""
        async with self.transaction() as transaction:
            return await transaction.find_snapshot(session_id, hot_turns)

    async def load_messages(self, session_uuid: str, before: int, limit: int) -> list[StoredMessage]:
        """Up to `limit` messages with a number below `before`, oldest first."""
        async with self.transaction() as transaction:
            rows = await transaction.fetch("load_messages", UUID(session_uuid), before, limit)
            return [stored_message_of(row) for row in reversed(rows)]

    async def list_sessions(self, which: SessionFilter, after: tuple[str, str] | None, limit: int) -> list[Session]:
        """Sessions by last activity, newest first, after the position `after` (last_activity_at, session_id)."""
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
            return [session_of(row, self._fields) for row in rows]

    async def totals(self, agent_id: str | None, left_out: Sequence[str]) -> Totals:
        """Totals over an agent's sessions (None: all), without those with the session ids `left_out`."""
        async with self.transaction(5) as transaction:
            row = (await transaction.fetch("session_stats", UUID(agent_id) if agent_id else None, list(left_out)))[0]
            return Totals(row["total_sessions"], row["active_sessions"], row["messages"])

    async def put_agent(self, agent: Agent) -> None:
        """Creates or replaces the agent. Raises DataRefused when another agent has its name."""
        async with self.transaction() as transaction:
            definition = msgspec.json.encode(agent.definition).decode()
            await transaction.fetch("put_agent", UUID(agent.id), agent.name, definition)

    async def change_agent(self, reference: str, change: Callable[[Agent | None], Agent]) -> tuple[Agent | None, Agent]:
        """Stores what `change` makes of an agent (None: there is none), with its row locked: no concurrent change is lost.

        Returns the agent before and after. Raises DataRefused when the name is another agent's.
        """
        agent_id = as_uuid(reference)
        async with self.transaction() as transaction:
            rows = await transaction.fetch("lock_agent", UUID(agent_id) if agent_id else None, reference)
            before = agent_of(rows[0]) if rows else None
            agent = change(before)
            # Compared as JSON: to Python, 1 is True.
            definition = msgspec.json.encode(agent.definition)
            if before is None or definition != msgspec.json.encode(before.definition):
                await transaction.fetch("put_agent", UUID(agent.id), agent.name, definition.decode())
            return before, agent

    async def find_agent(self, reference: str) -> Agent | None:
        """An agent by UUID or name."""
        agent_id = as_uuid(reference)
        async with self.transaction() as transaction:
            rows = await transaction.fetch("find_agent", UUID(agent_id) if agent_id else None, reference)
            return agent_of(rows[0]) if rows else None

    async def list_agents(self) -> list[Agent]:
        async with self.transaction() as transaction:
            return [agent_of(row) for row in await transaction.fetch("list_agents")]

    async def delete_agent(self, agent_id: str) -> None:
        async with self.transaction() as transaction:
            await transaction.fetch("delete_agent", UUID(agent_id))


class Transaction:
    """The statements of one transaction."""

    def __init__(self, connection: Connection, statements: dict[str, str], fields: SessionFields) -> None:
        self._connection = connection
        self._statements = statements
        self._fields = fields

    async def fetch(self, name: str, *arguments: Any) -> list[asyncpg.Record]:
        """Runs the statement of that name."""
        return await self._connection.fetch(self._statements[name], *arguments)

    async def run(self, sql: str) -> None:
        """Runs a script of several statements, such as a migration."""
        await self._connection.execute(sql)

    async def find_session(self, session_id: str) -> Session | None:
        rows = await self.fetch("find_session", session_id)
        return session_of(rows[0], self._fields) if rows else None

    async def find_snapshot(self, session_id: str, hot_turns: int) -> Snapshot | None:
        """A session with up to `hot_turns` of its newest turns."""
        session = await self.find_session(session_id)
        if session is None:
            return None
        first = max(1, session.turns - hot_turns + 1)
        rows = await self.fetch("load_turns", UUID(session.id), first)
        return Snapshot(session, first, turns_of(rows, first, session))

    async def erased_ids(self, ids: Collection[str]) -> set[str]:
        """Those of some sessions' ids that have been erased."""
        return {str(row["id"]) for row in await self.fetch("erased_ids", [UUID(one) for one in ids])}

    async def stored_messages(self, ids: Collection[str]) -> set[str]:
        """Those of some messages' ids that are stored."""
        return {str(row["id"]) for row in await self.fetch("stored_messages", [UUID(one) for one in ids])}

    async def flush(self, records: Sequence[Record]) -> list[Forgotten]:
        """Writes the records into the tables. Flushing a record again changes nothing. Returns the sessions of which
        Postgres knows something final that their newest record does not."""
        erased = [UUID(record.session.id) for record in records if record.session.status == "erased"]
        kept = [record for record in records if record.session.status != "erased"]
        await self.fetch("lock_erase" if erased else "lock_flush")
        if erased:
            await self.fetch("erase_sessions", erased)
        if not kept:
            return []
        newest: dict[str, Session] = {}
        for record in kept:
            known = newest.get(record.session.id)
            newest[record.session.id] = record.session if known is None else _newer(known, record.session)
        rows = await self.fetch("flush", *message_columns(kept), *session_columns(newest.values(), self._fields))
        over = [row["id"] for row in rows if row["status"] in ("ended", "timeout")]
        if over:
            await self.fetch("write_histories", over)
        return [forgotten for row in rows if (forgotten := _forgotten(row, newest[str(row["id"])]))]

    async def mark(self, partition: int, epoch: int, records: Sequence[Record]) -> None:
        """Notes how far Postgres is with a partition, once these records of that epoch are in it. Last in a transaction: the
        row is locked until it ends."""
        fence = max((record.turn.fence for record in records if record.turn), default=0)
        await self.fetch("mark", partition, epoch, fence)


def _newer(one: Session, other: Session) -> Session:
    """The newer of two states of a session, with what is final in either."""
    older, newer = sorted((one, other), key=lambda session: session.revision)
    if older.status == "ended" != newer.status:
        newer = msgspec.structs.replace(newer, status="ended", ended_at=older.ended_at)
    if older.user_id and not newer.user_id:
        newer = msgspec.structs.replace(newer, user_id=older.user_id)
    return newer


def _forgotten(row: asyncpg.Record, newest: Session) -> Forgotten | None:
    """What a session's row has that its newest record does not know."""
    if row["status"] == "erased":
        return Forgotten(newest.session_id, newest.id, "erased")
    if row["status"] == "ended" != newest.status:
        return Forgotten(newest.session_id, newest.id, "ended")
    if row["user_id"] and not newest.user_id:
        return Forgotten(newest.session_id, newest.id, "user")
    return None


async def _nothing_to_reset(connection: asyncpg.Connection) -> None:
    """Replaces the statements that asyncpg runs when a connection returns to the pool: no state outlives a transaction."""
