"""Migrations: numbered files, forward only, each applied once, all under one lock in one transaction."""

import hashlib
import re
from importlib.resources import files

import msgspec

from persistence.errors import MigrationError
from persistence.postgres.postgres import Postgres


class Migration(msgspec.Struct, frozen=True):
    """A file `migrations/<number>_<name>.sql`."""

    number: int
    name: str
    sql: str

    @property
    def checksum(self) -> str:
        return hashlib.sha256(self.sql.encode()).hexdigest()


def load_migrations() -> list[Migration]:
    """The migrations of this version, in order. Raises MigrationError when a number is missing or doubled."""
    found = []
    for file in (files("persistence") / "migrations").iterdir():
        if match := re.fullmatch(r"(\d{4})_(\w+)\.sql", file.name):
            found.append(Migration(int(match[1]), match[2], file.read_text()))
    found.sort(key=lambda migration: migration.number)
    check_numbers(found)
    return found


def check_numbers(migrations: list[Migration]) -> None:
    """Raises MigrationError unless the numbers run from 1 without a gap."""
    for expected, migration in enumerate(migrations, 1):
        if migration.number != expected:
            raise MigrationError(f"migration {expected:04d} is missing or doubled: found {migration.number:04d}")


async def migrate(postgres: Postgres, migrations: list[Migration]) -> list[Migration]:
    """Applies the migrations that are pending, and returns them.

    Raises MigrationError when the database has a migration that this version lacks, or one whose file has changed.
    """
    async with postgres.transaction(120) as transaction:
        await transaction.fetch("lock_migrations")
        await transaction.fetch("create_migrations")
        applied = {row["number"]: row for row in await transaction.fetch("applied_migrations")}
        for number, row in applied.items():
            if number > len(migrations):
                raise MigrationError(f"the database has migration {number:04d}_{row['name']}, newer than this version")
            if row["checksum"] != migrations[number - 1].checksum:
                raise MigrationError(f"migration {number:04d}_{row['name']} has changed since it was applied")
        if sorted(applied) != list(range(1, len(applied) + 1)):
            raise MigrationError(f"the database lacks a migration before number {max(applied):04d}")
        pending = migrations[len(applied) :]
        for migration in pending:
            await transaction.run(migration.sql)
            await transaction.fetch("insert_migration", migration.number, migration.name, migration.checksum)
        return pending
