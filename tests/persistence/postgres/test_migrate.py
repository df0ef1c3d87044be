"""Migrations: what they make, and what they refuse."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from itertools import count
from typing import Any

import asyncpg
import msgspec
import pytest

from gateway.dev.servers.postgres import PostgresServer
from persistence.errors import MigrationError, PersistenceError
from persistence.postgres.migrate import Migration, check_numbers, load_migrations, migrate
from persistence.postgres.postgres import Postgres
from tests.support.stored import Rows

_number = count(1)

# name: (type, longest, null allowed, default)
SESSION_COLUMNS = {
    "id": ("uuid", None, False, None),
    "session_id": ("character varying", 255, False, None),
    "agent_id": ("uuid", None, False, None),
    "user_id": ("uuid", None, True, None),
    "external_user_id": ("text", None, True, None),
    "website_domain": ("character varying", 255, True, None),
    "ip_address": ("character varying", 45, True, None),
    "channel": ("character varying", 50, False, "text"),
    "message_count": ("integer", None, False, "0"),
    "conversation_history": ("jsonb", None, True, None),
    "context_data": ("jsonb", None, True, None),
    "metadata": ("jsonb", None, False, "{}"),
    "status": ("character varying", 50, False, "active"),
    "started_at": ("timestamp with time zone", None, False, "now()"),
    "last_activity_at": ("timestamp with time zone", None, False, "now()"),
    "ended_at": ("timestamp with time zone", None, True, None),
}
MESSAGE_COLUMNS = {
    "id": ("uuid", None, False, None),
    "session_id": ("uuid", None, False, None),
    "role": ("character varying", 20, False, None),
    "content": ("text", None, False, None),
    "audio_url": ("text", None, True, None),
    "audio_duration_ms": ("integer", None, True, None),
    "tokens_used": ("integer", None, True, None),
    "latency_ms": ("integer", None, True, None),
    "model_used": ("character varying", 100, True, None),
    "metadata": ("jsonb", None, True, None),
    "turn_id": ("uuid", None, False, None),
    "seq": ("integer", None, False, None),
    "created_at": ("timestamp with time zone", None, False, "now()"),
}
SESSION_ROW = "INSERT INTO agent_sessions (id, session_id, agent_id) VALUES (gen_random_uuid(), 's', gen_random_uuid())"


@pytest.fixture
async def postgres(postgres_server: PostgresServer) -> AsyncIterator[Postgres]:
    """A database without any table."""
    url = await asyncio.to_thread(postgres_server.create_database, f"migrate_{next(_number)}")
    postgres = Postgres(url, timeout_s=30)
    yield postgres
    await postgres.close()


@pytest.fixture
async def fetch(postgres: Postgres) -> AsyncIterator[Rows]:
    connection = await asyncpg.connect(postgres._url)

    async def fetch(sql: str, *arguments: Any) -> list[Any]:
        return list(await connection.fetch(sql, *arguments))

    yield fetch
    await connection.close()


def made(number: int, sql: str = "") -> Migration:
    return Migration(number, f"table_{number}", sql or f"CREATE TABLE table_{number} (id int)")


@pytest.mark.parametrize(("table", "columns"), [("agent_sessions", SESSION_COLUMNS), ("agent_messages", MESSAGE_COLUMNS)])
async def test_the_specified_columns_are_there(rows: Rows, table: str, columns: dict[str, Any]) -> None:
    found = await rows("SELECT * FROM information_schema.columns WHERE table_name = $1", table)
    actual = {
        row["column_name"]: (
            row["data_type"],
            row["character_maximum_length"],
            row["is_nullable"] == "YES",
            row["column_default"] and row["column_default"].partition("::")[0].strip("'"),
        )
        for row in found
    }
    assert {name: actual.get(name) for name in columns} == columns


async def test_every_timestamp_has_a_time_zone(rows: Rows) -> None:
    found = await rows(
        "SELECT table_name, column_name FROM information_schema.columns "
        "WHERE table_schema = 'public' AND data_type = 'timestamp without time zone'"
    )
    assert found == []


async def test_the_specified_indexes_are_there_under_their_names(rows: Rows) -> None:
    found = await rows("SELECT tablename, indexname, indexdef FROM pg_indexes WHERE schemaname = 'public'")
    indexes = {row["indexname"]: (row["tablename"], row["indexdef"].partition("btree ")[2]) for row in found}
    assert indexes["agent_sessions_pkey"] == ("agent_sessions", "(id)")
    assert indexes["idx_sessions_session_id"] == ("agent_sessions", "(session_id)")
    assert indexes["idx_sessions_agent_id"] == ("agent_sessions", "(agent_id)")
    assert indexes["idx_sessions_status"] == ("agent_sessions", "(status)")
    assert indexes["agent_messages_pkey"] == ("agent_messages", "(id)")
    assert indexes["idx_messages_session"] == ("agent_messages", "(session_id, seq)")
    assert indexes["idx_messages_created"] == ("agent_messages", "(created_at)")


async def test_the_rules_are_constraints(rows: Rows) -> None:
    found = await rows(
        "SELECT conrelid::regclass::text AS table_name, contype::text, pg_get_constraintdef(oid) AS rule FROM pg_constraint"
    )
    rules = {(row["table_name"], row["contype"], row["rule"]) for row in found}
    assert ("agent_sessions", "u", "UNIQUE (session_id)") in rules
    assert (
        "agent_messages",
        "f",
        "FOREIGN KEY (session_id) REFERENCES agent_sessions(id) ON DELETE CASCADE",
    ) in rules
    assert await rows("SELECT indisunique FROM pg_index WHERE indexrelid = 'idx_messages_session'::regclass AND indisunique")


@pytest.mark.parametrize(
    ("column", "value"), [("channel", "'fax'"), ("status", "'erased'"), ("message_count", "-1"), ("agent_id", "NULL")]
)
async def test_a_session_outside_the_rules_is_refused(rows: Rows, column: str, value: str) -> None:
    columns = {"id": "gen_random_uuid()", "session_id": "'s'", "agent_id": "gen_random_uuid()", column: value}
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await rows(f"INSERT INTO agent_sessions ({', '.join(columns)}) VALUES ({', '.join(columns.values())})")


async def test_what_was_stored_before_can_be_found_by_its_activity(postgres: Postgres, fetch: Rows) -> None:
    await migrate(postgres, load_migrations()[:2])
    moments = ["2026-01-01 12:04:59.999+00", "2026-01-01 12:05:00+00", "1999-12-31 23:59:00+00"]
    columns = "id, session_id, agent_id, last_activity_at"
    stored = f"INSERT INTO agent_sessions ({columns}) SELECT gen_random_uuid(), at, gen_random_uuid(), at::timestamptz"
    await fetch(f"{stored} FROM unnest($1::text[]) AS moments (at)", moments)
    await migrate(postgres, load_migrations())
    found = await fetch("SELECT session_id, active_in AT TIME ZONE 'UTC' AS bin FROM agent_sessions")
    assert {row["session_id"]: str(row["bin"]) for row in found} == dict(
        zip(moments, ["2026-01-01 12:00:00", "2026-01-01 12:05:00", "1999-12-31 23:55:00"], strict=True)
    )


@pytest.mark.parametrize(("column", "value"), [("role", "'tool'"), ("seq", "0"), ("turn", "0"), ("content", "NULL")])
async def test_a_message_outside_the_rules_is_refused(rows: Rows, column: str, value: str) -> None:
    await rows(SESSION_ROW)
    columns = {
        "id": "gen_random_uuid()",
        "session_id": "(SELECT id FROM agent_sessions)",
        "role": "'user'",
        "content": "''",
        "turn_id": "gen_random_uuid()",
        "turn": "1",
        "seq": "1",
        column: value,
    }
    with pytest.raises(asyncpg.IntegrityConstraintViolationError):
        await rows(f"INSERT INTO agent_messages ({', '.join(columns)}) VALUES ({', '.join(columns.values())})")


async def test_migrating_twice_applies_once(postgres: Postgres) -> None:
    migrations = load_migrations()
    assert await migrate(postgres, migrations) == migrations
    assert await migrate(postgres, migrations) == []
    assert await postgres.migrated_to() == len(migrations)


async def test_processes_that_migrate_at_once_apply_once(postgres: Postgres, fetch: Rows) -> None:
    others = [Postgres(postgres._url, timeout_s=30) for _ in range(6)]
    migrations = [*load_migrations(), *(made(number) for number in range(len(load_migrations()) + 1, 6))]
    applied = await asyncio.gather(*(migrate(other, migrations) for other in others))
    await asyncio.gather(*(other.close() for other in others))
    assert sorted(map(len, applied)) == [0, 0, 0, 0, 0, len(migrations)]
    assert [row["number"] for row in await fetch("SELECT number FROM schema_migrations ORDER BY 1")] == [1, 2, 3, 4, 5]


async def test_without_the_lock_they_would_get_in_each_others_way(
    postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control of the test above."""
    others = [Postgres(postgres._url, timeout_s=30) for _ in range(6)]
    for other in others:
        monkeypatch.setitem(other.statements, "lock_migrations", "SELECT 1")
    slow = [made(1, "SELECT pg_sleep(0.2); CREATE TABLE table_1 (id int)")]
    applied = await asyncio.gather(*(migrate(other, slow) for other in others), return_exceptions=True)
    await asyncio.gather(*(other.close() for other in others))
    assert any(isinstance(outcome, PersistenceError) for outcome in applied)


async def test_only_what_is_new_is_applied(postgres: Postgres, fetch: Rows) -> None:
    await migrate(postgres, [made(1)])
    assert await migrate(postgres, [made(1), made(2)]) == [made(2)]
    assert await fetch("SELECT * FROM table_2") == []


async def test_a_migration_that_fails_leaves_nothing(postgres: Postgres, fetch: Rows) -> None:
    with pytest.raises(PersistenceError):
        await migrate(postgres, [made(1), made(2, "CREATE TABLE table_2 (id int); SELECT 1 / 0")])
    assert await fetch("SELECT 1 FROM pg_tables WHERE schemaname = 'public'") == []
    assert len(await migrate(postgres, [made(1), made(2)])) == 2


@pytest.mark.parametrize("numbers", [[2], [1, 3], [1, 1], [1, 2, 2, 3], [0, 1]])
def test_numbers_with_a_gap_or_twice_are_refused(numbers: list[int]) -> None:
    with pytest.raises(MigrationError, match="missing or doubled"):
        check_numbers([made(number) for number in numbers])


def test_the_migrations_of_this_version_have_no_gap() -> None:
    assert [migration.number for migration in load_migrations()] == list(range(1, len(load_migrations()) + 1))


async def test_a_migration_that_changed_after_it_was_applied_is_refused(postgres: Postgres, fetch: Rows) -> None:
    await migrate(postgres, [made(1), made(2)])
    changed = msgspec.structs.replace(made(1), sql="CREATE TABLE table_1 (id bigint)")
    with pytest.raises(MigrationError, match="0001_table_1 has changed"):
        await migrate(postgres, [changed, made(2), made(3)])
    assert len(await fetch("SELECT 1 FROM schema_migrations")) == 2


async def test_a_database_newer_than_this_version_is_refused(postgres: Postgres) -> None:
    await migrate(postgres, [made(1), made(2)])
    with pytest.raises(MigrationError, match=r"0002_table_2, newer than this version"):
        await migrate(postgres, [made(1)])


async def test_a_database_that_lacks_one_in_between_is_refused(postgres: Postgres, fetch: Rows) -> None:
    """Forward only: what an older number says may not be true any more on top of a newer one."""
    await migrate(postgres, [made(1), made(2), made(3)])
    await fetch("DELETE FROM schema_migrations WHERE number = 2")
    await fetch("DROP TABLE table_2")
    with pytest.raises(MigrationError):
        await migrate(postgres, [made(1), made(2), made(3)])


async def test_a_database_that_was_never_migrated_is_told_from_one_that_was(
    postgres: Postgres, rows: Callable[..., Awaitable[list[Any]]]
) -> None:
    with pytest.raises(PersistenceError, match="UndefinedTable"):
        await postgres.migrated_to()
