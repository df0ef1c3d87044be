"""A field is added to the list of a session's fields, in a copy of it: what older versions stored is read and goes on.

The stored samples, a real Redis, and a real Postgres that gets the columns when a migration would add them.
"""

import json
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import AsyncExitStack
from itertools import count
from typing import Any

import asyncpg
import msgspec
import pytest
from uuid_utils.compat import uuid7

from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer
from persistence.errors import Damaged
from persistence.housekeeping import Housekeeping
from persistence.hydrator import Hydrator
from persistence.model.codec import decode_record
from persistence.model.fields import HEADER, STATE, Column, Field, SessionFields
from persistence.model.kinds import FLAG, MOMENT, OBJECT, TEXT, WHOLE, optional
from persistence.model.session import Session
from persistence.postgres.migrate import load_migrations, migrate
from persistence.postgres.postgres import Postgres
from persistence.redis.agent_copies import AgentCopies
from persistence.redis.connection import connect
from persistence.redis.keys import Keys
from persistence.redis.outcomes import Begun, Hot, Opened
from persistence.redis.partitions import Partitions
from persistence.redis.scripts import Scripts
from persistence.worker import Worker
from tests.support.layer import OPERATOR, POLICY, Layer, new_session, new_turn
from tests.support.rule import breaches
from tests.support.samples import FLUSHED, REFUSED, WAITING, load_sample, store_sample

OLD = SessionFields(HEADER, STATE, Session)


class Added(Session, kw_only=True):
    colour: str = "blue"
    visits: int = 0
    tags: dict[str, Any] = {}  # noqa: RUF012  # msgspec copies it
    vip: bool = False
    seen_at: str = ""


ADDED_FIELDS = (
    Field("colour", TEXT, "a test", (Column("colour", "text", changes=True),), default="blue"),
    Field("visits", WHOLE, "a test", (Column("visits", "int", changes=True),), default="0"),
    Field("tags", OBJECT, "a test", (Column("tags", "jsonb", changes=True),), default="{}"),
    Field("vip", FLAG, "a test", (Column("vip", "bool", changes=True),), default="0"),
    Field("seen_at", optional(MOMENT), "a test", (Column("seen_at", "timestamptz", changes=True, null=""),), default=""),
)
MOOD = Field("mood", TEXT, "a test", default="calm")
NEW = SessionFields((*HEADER, *ADDED_FIELDS), (*STATE, MOOD), Added)

MIGRATION = """
ALTER TABLE agent_sessions ADD colour text, ADD visits int, ADD tags jsonb, ADD vip bool, ADD seen_at timestamptz;
CREATE OR REPLACE VIEW session_headers AS
SELECT
    id, session_id, agent_id, channel, status, coalesce(external_user_id, user_id::text, '') AS user_id,
    coalesce(website_domain, '') AS website_domain, coalesce(ip_address, '') AS ip_address,
    coalesce(user_agent, '') AS user_agent, started_at, last_activity_at, ended_at, message_count,
    coalesce(context_data, '{}')::text AS context, metadata::text AS metadata, minted, turns, revision, active_in,
    colour, visits, tags, vip, seen_at
FROM agent_sessions;
"""

DEFAULTS: tuple[Any, ...] = ("blue", 0, {}, False, "")
CHANGED = ("red", 3, {"plan": ["a"]}, True, "2026-11-27T09:00:00.123Z")
STORED = {"colour": "red", "visits": "3", "tags": '{"plan":["a"]}', "vip": "1", "seen_at": "2026-11-27T09:00:00.123Z"}


class Strict(Session, kw_only=True):
    colour: str


WITHOUT_DEFAULT = SessionFields((*HEADER, Field("colour", TEXT, "a test", (Column("colour", "text"),))), STATE, Strict)
STRICT_STATE = SessionFields(HEADER, (*STATE, Field("mood", TEXT, "a test")), Session)


def added(session: Session) -> tuple[Any, ...]:
    """The values of the added fields."""
    assert isinstance(session, Added)
    return session.colour, session.visits, session.tags, session.vip, session.seen_at


class Version(Layer):
    """A pod and a worker of a version, whose session fields are these."""

    def __init__(self, redis_url: str, database_url: str, fields: SessionFields) -> None:
        client = connect(redis_url)
        super().__init__(client, Keys("gw", 1), Scripts(client, fields=fields))
        copies = AgentCopies(self.scripts, self.keys)
        self.postgres = Postgres(database_url, timeout_s=30, fields=fields)
        self.hydrator = Hydrator(self.sessions, self.postgres, copies)
        partitions = Partitions(self.scripts, self.keys)
        jobs = Housekeeping(
            self.scripts, self.keys, self.sessions, self.postgres, copies, partitions, session_timeout_s=3600
        )
        self.worker = Worker(self.outbox, self.postgres, self.sessions, jobs, fields=fields)

    async def session(self, session_id: str) -> Session:
        """The session as an operator reads it, hydrated if need be."""
        hot = await self.hydrator.with_session(session_id, lambda: self.sessions.read(session_id, OPERATOR))
        assert isinstance(hot, Hot), hot
        return hot.session

    async def turn(self, session_id: str) -> Session:
        """A whole turn; the session as the turn found it."""
        turn_id = str(uuid7())
        begun = await self.hydrator.with_session(
            session_id, lambda: self.sessions.begin(session_id, turn_id, OPERATOR, POLICY)
        )
        assert isinstance(begun, Begun), begun
        assert await self.commit(begun, new_turn(begun, turn_id))
        return begun.session

    async def drain(self) -> None:
        assert await self.worker.drain(10)

    async def close(self) -> None:
        await self.postgres.close()
        await self.client.aclose()


databases = count(1)


class Place:
    """A Redis and a database of its own, on which versions work."""

    def __init__(self, redis_url: str, database_url: str, stack: AsyncExitStack) -> None:
        self.redis_url = redis_url
        self.database_url = database_url
        self._stack = stack

    def version(self, fields: SessionFields) -> Version:
        version = Version(self.redis_url, self.database_url, fields)
        self._stack.push_async_callback(version.close)
        return version

    async def migrate(self) -> None:
        """Adds the columns, as the newer version's migration would."""
        connection = await asyncpg.connect(self.database_url)
        await connection.execute(MIGRATION)
        await connection.close()

    async def rows(self, sql: str, *arguments: Any) -> list[tuple[Any, ...]]:
        connection = await asyncpg.connect(self.database_url)
        found = [tuple(row) for row in await connection.fetch(sql, *arguments)]
        await connection.close()
        return found

    async def row(self, session_id: str) -> tuple[Any, ...]:
        """The added columns of a session's row."""
        columns = "colour, visits, tags, vip, seen_at"
        (row,) = await self.rows(f"SELECT {columns} FROM agent_sessions WHERE session_id = $1", session_id)
        return row


@pytest.fixture
async def place(redis_server: RedisServer, postgres_server: PostgresServer) -> AsyncIterator[Place]:
    """Empty; the database is migrated as the older version's is."""
    async with AsyncExitStack() as stack:
        place = Place(redis_server.url, postgres_server.create_database(f"added_{next(databases)}"), stack)
        old = place.version(OLD)
        await old.client.flushall()
        await migrate(old.postgres, load_migrations())
        yield place
        wrong = await breaches(old.client, old.keys)
        await old.client.flushall()
        assert not wrong, "; ".join(wrong)


@pytest.fixture(params=[1, 2], ids=["records-1", "records-2"])
async def stored(request: pytest.FixtureRequest, place: Place) -> Version:
    """The newer version, on the stored samples and a migrated database."""
    new = place.version(NEW)
    await store_sample(new.client, load_sample(request.param))
    await place.migrate()
    return new


# ------------------------------------------------------------------------------------------------ what older versions stored


async def test_old_hashes_and_records_are_read_written_flushed_and_hydrated(place: Place, stored: Version) -> None:
    new = stored
    assert added(await new.session(WAITING)) == DEFAULTS
    found = await new.turn(WAITING)
    assert (added(found), found.turns, found.message_count) == (DEFAULTS, 2, 4)
    await new.drain()
    assert await new.outbox.dead_letters(), "the sample has one, and only that"
    assert await place.row(WAITING) == ("blue", 0, "{}", False, None)

    await new.set(WAITING, **STORED, mood="glad")  # as a script of the newer version would
    assert added(await new.turn(WAITING)) == CHANGED
    await new.drain()
    colour, visits, tags, vip, seen_at = await place.row(WAITING)
    assert (colour, visits, json.loads(tags), vip, seen_at.year) == ("red", 3, {"plan": ["a"]}, True, 2026)

    await new.evict(WAITING)
    assert added(await new.session(WAITING)) == CHANGED
    fields = await new.fields(WAITING)
    assert {name: fields[name] for name in STORED} == STORED
    assert fields["mood"] == "calm", "Postgres keeps no state"
    assert (await new.read(WAITING)).session.turns == 4


async def test_an_old_dead_letter_is_retried(place: Place, stored: Version) -> None:
    (letter,) = await stored.outbox.dead_letters()
    assert await stored.outbox.retry_dead(letter)
    await stored.drain()
    assert await stored.outbox.dead_letters() == []
    assert await place.row(REFUSED) == ("blue", 0, "{}", False, None)


async def test_scripts_that_write_a_record_themselves_write_the_default(place: Place, stored: Version) -> None:
    new = stored
    for session_id in (FLUSHED, WAITING):
        await new.session(session_id)  # compares what was stored before there were epochs with Postgres
    found = await new.sessions.open(new_session(FLUSHED, agent_id=(await new.session(FLUSHED)).agent_id), authorized=True)
    assert isinstance(found, Opened)
    assert added(found.session) == DEFAULTS
    ended = await new.sessions.end(FLUSHED, OPERATOR)
    assert isinstance(ended, Session)
    assert added(ended) == DEFAULTS
    assert await new.sessions.time_out(WAITING, 0) is True
    await new.drain()
    for session_id in (FLUSHED, WAITING):
        assert await place.row(session_id) == ("blue", 0, "{}", False, None)
    assert isinstance(await new.sessions.erase(WAITING, OPERATOR), str)
    await new.drain()
    assert await place.rows("SELECT 1 FROM agent_sessions WHERE session_id = $1", WAITING) == []


async def test_old_rows_are_hydrated_and_written(place: Place) -> None:
    old, new = place.version(OLD), place.version(NEW)
    session_id = (await old.open()).session_id
    await old.turn(session_id)
    await old.drain()
    await old.evict(session_id)
    await place.migrate()
    assert await place.row(session_id) == (None, None, None, None, None)
    assert added(await new.session(session_id)) == DEFAULTS
    assert added(await new.turn(session_id)) == DEFAULTS
    await new.drain()
    assert await place.row(session_id) == ("blue", 0, "{}", False, None)


async def test_a_new_session_has_the_default_everywhere(place: Place) -> None:
    await place.migrate()
    new = place.version(NEW)
    session = await new.open()
    assert added(session) == DEFAULTS
    fields = await new.fields(session.session_id)
    assert (fields["colour"], fields["seen_at"], fields["mood"]) == ("blue", "", "calm")
    await new.drain()
    assert await place.row(session.session_id) == ("blue", 0, "{}", False, None)


# --------------------------------------------------------------------------------------------------------- a rolling upgrade


async def test_chat_goes_on_before_the_database_is_migrated_and_records_wait(place: Place) -> None:
    old, new = place.version(OLD), place.version(NEW)
    session_id = (await old.open()).session_id
    await old.turn(session_id)
    await old.drain()
    await old.evict(session_id)
    assert added(await new.turn(session_id)) == DEFAULTS
    assert not await new.worker.drain(0.5)
    assert await new.outbox.dead_letters() == []
    await place.migrate()
    await new.drain()
    assert await place.row(session_id) == ("blue", 0, "{}", False, None)


async def test_both_versions_work_on_one_session_in_turn(place: Place) -> None:
    await place.migrate()
    old, new = place.version(OLD), place.version(NEW)
    session_id = (await new.open()).session_id
    await new.set(session_id, **STORED)
    for version in (old, new, old, new):
        await version.turn(session_id)
    assert added(await new.session(session_id)) == CHANGED, "the older version leaves what it does not know"
    await new.drain()
    assert (await place.row(session_id))[0] == "red"
    await old.turn(session_id)
    await old.drain()
    assert (await place.row(session_id))[0] == "red", "and knows nothing of the column"


@pytest.mark.parametrize(
    ("field", "value"), [("visits", "many"), ("tags", "["), ("vip", "2"), ("seen_at", "soon"), ("colour", b"\xff")]
)
async def test_garbage_in_an_added_field_is_damage(place: Place, field: str, value: str | bytes) -> None:
    new = place.version(NEW)
    session_id = (await new.open()).session_id
    await new.set(session_id, **{field: value})
    for operation in (new.sessions.begin(session_id, "t", OPERATOR, POLICY), new.sessions.read(session_id, OPERATOR)):
        with pytest.raises(Damaged) as caught:
            await operation
        assert caught.value.field == field


# -------------------------------------------------------------------------------------------------------------- the controls


@pytest.mark.parametrize(("fields", "name"), [(WITHOUT_DEFAULT, "colour"), (STRICT_STATE, "mood")])
async def test_without_a_default_an_old_hash_is_damaged(place: Place, fields: SessionFields, name: str) -> None:
    version = place.version(fields)
    await store_sample(version.client, load_sample())
    await version.set(WAITING, epoch=1)
    await version.client.execute_command("HSET", version.keys.epoch(0), "epoch", 1)
    operations: list[Awaitable[Any]] = [
        version.sessions.read(WAITING, OPERATOR),
        version.sessions.end(WAITING, OPERATOR),
        version.sessions.time_out(WAITING, 0),
    ]
    if name == "colour":  # begin checks the state that it uses
        operations.append(version.sessions.begin(WAITING, "t", OPERATOR, POLICY))
    for operation in operations:
        with pytest.raises(Damaged) as caught:
            await operation
        assert caught.value.field == name


@pytest.mark.parametrize("records", [1, 2])
def test_without_a_default_an_old_record_is_damaged(records: int) -> None:
    sample = load_sample(records)
    for stream in ("gw:{0}:outbox", "gw:{0}:dead"):
        for entry, fields in sample[stream]["value"].items():
            raw = _flat(fields)
            assert added(decode_record(entry.encode(), raw, NEW).session) == DEFAULTS
            with pytest.raises(Damaged) as caught:
                decode_record(entry.encode(), raw, WITHOUT_DEFAULT)
            assert caught.value.field == "colour"


def _flat(fields: dict[str, str]) -> Sequence[bytes]:
    return [part.encode() for pair in fields.items() for part in pair]


@pytest.mark.parametrize("migrated", [True, False])
async def test_without_a_default_an_old_row_is_damaged(place: Place, migrated: bool) -> None:
    old, strict = place.version(OLD), place.version(WITHOUT_DEFAULT)
    session_id = (await old.open()).session_id
    await old.drain()
    if migrated:
        await place.migrate()
    with pytest.raises(Damaged) as caught:
        await strict.postgres.find_session(session_id)
    assert caught.value.field == "colour"


# --------------------------------------------------------------------------------------------------- the list and the struct


class Another(Session, kw_only=True):
    colour: str = "green"


@pytest.mark.parametrize(
    ("header", "struct", "what"),
    [
        ((*HEADER, *ADDED_FIELDS), Session, "not those of Session"),
        (HEADER, Added, "not those of Added"),
        ((*HEADER, ADDED_FIELDS[0]), Strict, "colour has a default in one"),
        ((*HEADER, msgspec.structs.replace(ADDED_FIELDS[0], default=None)), Another, "colour has a default in one"),
        ((*HEADER, ADDED_FIELDS[0]), Another, "default of colour"),
    ],
)
def test_a_list_and_a_struct_that_differ_are_refused(header: Sequence[Field], struct: type[Session], what: str) -> None:
    with pytest.raises(TypeError, match=what):
        SessionFields(header, STATE, struct)
