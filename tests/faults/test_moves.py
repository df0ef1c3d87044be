"""A server turns read-only, and its name leads to another one: nobody stays with the old one, and no process is restarted.

A link stands for the name, as a managed service's or a proxy's: who is connected stays where he is.
"""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any
from uuid import uuid4

import asyncpg
import pytest
from redis.asyncio import Redis

from gateway.app import Stores
from gateway.dev.servers.ports import HOST, free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.process import wait_until
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from persistence.errors import PostgresUnavailable, RedisUnavailable
from persistence.model.agents import Agent, AgentDefinition
from persistence.postgres.postgres import Postgres
from persistence.redis.connection import connect
from persistence.redis.pool import HeldPool
from persistence.redis.scripts import Scripts
from tests.conftest import migrated_server, put_in, settings_for
from tests.support.links import Link
from tests.support.pods import ServedPod, gated_pod
from tests.support.serving import wait_for
from tests.support.stored import another_worker, contents, say
from tests.support.visiting import Rows, new_session_id

CHANNEL = "gw:test"
SOON_S = 3.0
"""A second until a server is asked again, a second for the call that finds out, and one for a busy machine."""

Heard = list[str]

# --------------------------------------------------------------------------------------------------------------- Redis


class Redises:
    """A master, its replica, and the name that leads to the master."""

    def __init__(self, old: RedisServer, new: RedisServer, name: Link) -> None:
        self.old = old
        self.new = new
        self.name = name

    def demote(self) -> None:
        """The replica takes over, and the master follows one that is not there: no publication reaches it."""
        assert wait_until(self._in_step, 15), "the replica has it all"
        self.new.ask("REPLICAOF", "NO", "ONE")
        self.old.ask("REPLICAOF", HOST, str(free_port()))

    def _in_step(self) -> bool:
        offsets = [server.facts("INFO", "replication").get("master_repl_offset") for server in (self.old, self.new)]
        return self.new.follows() and offsets[0] == offsets[1]

    def move(self) -> None:
        """The name leads to the new master."""
        self.name.lead_to(self.new.url)

    def listeners(self) -> int:
        """How many subscriptions the new master has."""
        match self.new.ask("PUBSUB", "NUMSUB", CHANNEL):
            case [_, int(count)]:
                return count
        raise AssertionError("no number")


@pytest.fixture
async def redises(tmp_path: Path) -> AsyncIterator[Redises]:
    with RedisServer(tmp_path / "old", free_port(), config={"repl-diskless-sync-delay": "0"}) as old:
        follows = {"replicaof": f"{HOST} {old.port}"}
        with RedisServer(tmp_path / "new", free_port(), config=follows) as new:
            assert wait_until(new.follows, 15), "the replica follows"
            async with Link(old.url) as name:
                yield Redises(old, new, name)


@pytest.fixture
def settings(redises: Redises, postgres_server: PostgresServer) -> Settings:
    return settings_for(redises.name.url, postgres_server.url)


@pytest.fixture
async def pod(settings: Settings, stores: Stores) -> AsyncIterator[ServedPod]:
    """A pod with connections that have been used, subscriptions among them."""
    await put_in(stores)("shop", graph="gated")
    async with gated_pod(settings) as pod:
        pod.gated.open()
        await wait_for(lambda: answers(pod), "the first message is answered")
        await asyncio.gather(*(answers(pod) for _ in range(8)))
        yield pod


@pytest.fixture
async def heard(pod: ServedPod, redises: Redises) -> Heard:
    """What a subscription of the pod hears."""
    heard: Heard = []
    await pod.pod.wakeups.subscribe(CHANNEL, heard.append)
    await wait_for(lambda: published(redises.old, heard), "the subscription is made")
    return heard


async def published(server: RedisServer, heard: Heard) -> bool:
    """Whether what is published on a server is heard."""
    word = str(uuid4())
    async with Redis(port=server.port) as client:
        await client.publish(CHANNEL, word)
    return word in heard or await heard_since(heard, word)


async def heard_since(heard: Heard, word: str) -> bool:
    try:
        await wait_for(lambda: word in heard, word, 0.1)
    except AssertionError:
        return False
    return True


async def answers(pod: ServedPod) -> bool:
    answer = await pod.ask("Hello", new_session_id())
    assert answer.status_code in (200, 503), answer.text
    return answer.status_code == 200


async def test_a_name_that_leads_to_another_redis_is_followed(pod: ServedPod, heard: Heard, redises: Redises) -> None:
    redises.demote()
    answer = await pod.ask("Hello", new_session_id())
    assert (answer.status_code, answer.json()["code"]) == (503, "redis_unavailable")
    redises.move()
    await wait_for(lambda: answers(pod), "messages are answered again", SOON_S)
    # All of them: no connection to the old server is left to meet.
    assert all(await asyncio.gather(*(answers(pod) for _ in range(8))))
    await wait_for(lambda: published(redises.new, heard), "wake-ups are heard from the new master", SOON_S)


@pytest.mark.parametrize("guarded", [True, False], ids=["as it is", "control: the connection is kept"])
async def test_a_connection_to_a_server_that_is_no_master_any_more_is_closed(
    redises: Redises, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """With one connection alone: a second one would find out for the first."""
    if not guarded:
        monkeypatch.setattr("persistence.redis.pool.NO_MASTER", ())
    client = connect(redises.name.url)
    scripts = Scripts(client, concurrency=1)
    await scripts.command("SET", "gw:{0}:awaited", "1")
    redises.demote()
    redises.move()
    if guarded:
        await scripts.command("SET", "gw:{0}:awaited", "2")
    else:
        for _ in range(10):
            with pytest.raises(RedisUnavailable, match="ReadOnly"):
                await scripts.command("SET", "gw:{0}:awaited", "2")
    await client.aclose()


async def test_control_a_subscription_that_is_kept_hears_nothing(
    pod: ServedPod, heard: Heard, redises: Redises, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def doubt(self: HeldPool) -> None:
        """Doubts nothing."""

    monkeypatch.setattr(HeldPool, "_doubt", doubt)
    redises.demote()
    redises.move()
    await wait_for(lambda: answers(pod), "messages are answered again", SOON_S)
    assert redises.listeners() == 0


# ------------------------------------------------------------------------------------------------------------ Postgres


@pytest.fixture(scope="module")
def old_postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A server of this module's own, that tests turn read-only."""
    with migrated_server(tmp_path_factory.mktemp("postgres")) as server:
        yield server


async def set_read_only(server: PostgresServer, value: str) -> None:
    """Also for sessions that are open: they learn it before their next transaction."""
    connection = await asyncpg.connect(server.url)
    await connection.execute("SET default_transaction_read_only = off")
    await connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
    await connection.execute("SELECT pg_reload_conf()")
    await connection.close()

    async def done() -> bool:
        looking = await asyncpg.connect(server.url)
        try:
            return bool(await looking.fetchval("SHOW default_transaction_read_only") == value)
        finally:
            await looking.close()

    await wait_for(done, f"the server is read-only: {value}")


@pytest.fixture
async def postgres_name(old_postgres: PostgresServer) -> AsyncIterator[Link]:
    async with Link(old_postgres.url) as name:
        yield name
    await set_read_only(old_postgres, "off")


@pytest.fixture
async def postgres(postgres_name: Link) -> AsyncIterator[Postgres]:
    """A pool with a connection that has been used."""
    postgres = Postgres(postgres_name.url, timeout_s=10)
    assert await writes(postgres)
    yield postgres
    await postgres.close()


async def writes(postgres: Postgres) -> bool:
    name = uuid4()
    try:
        await postgres.put_agent(Agent(str(name), str(name), AgentDefinition(graph="echo")))
    except PostgresUnavailable as error:
        assert "25006" in str(error) or "ReadOnly" in str(error), error
        return False
    return True


async def test_a_name_that_leads_to_another_postgres_is_followed(
    postgres: Postgres, postgres_name: Link, old_postgres: PostgresServer, postgres_server: PostgresServer
) -> None:
    await set_read_only(old_postgres, "on")
    assert not await writes(postgres)
    postgres_name.lead_to(postgres_server.url)
    assert await writes(postgres)


async def test_control_who_keeps_the_connections_writes_nothing(
    postgres: Postgres,
    postgres_name: Link,
    old_postgres: PostgresServer,
    postgres_server: PostgresServer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def expire_connections(self: asyncpg.Pool) -> None:
        """Keeps them."""

    monkeypatch.setattr(asyncpg.Pool, "expire_connections", expire_connections)
    await set_read_only(old_postgres, "on")
    postgres_name.lead_to(postgres_server.url)
    for _ in range(5):
        assert not await writes(postgres)


async def test_a_postgres_that_is_read_only_for_a_while_costs_nothing(
    settings: Settings, stores: Stores, old_postgres: PostgresServer
) -> None:
    """The flush and changes of agents go on by themselves, and reading works meanwhile."""
    async with another_worker(settings, "worker", database_url=old_postgres.url) as worker:
        session_id = new_session_id()
        own = Postgres(old_postgres.url, timeout_s=10)
        await say(stores, session_id, "first")
        await worker.flush_once()
        await set_read_only(old_postgres, "on")
        try:
            await say(stores, session_id, "second")
            with pytest.raises(PostgresUnavailable):
                await worker.flush_once()
            assert not await writes(own)
            assert await own.find_session(session_id) is not None
        finally:
            await set_read_only(old_postgres, "off")
        assert await worker.drain(10)
        assert await writes(own)
        assert await contents(rows_of(old_postgres), session_id) == [
            text for said in ("first", "second") for text in (said, f"You said: {said}")
        ]
        assert await stores.outbox.dead_letters() == []
        await own.close()


def rows_of(server: PostgresServer) -> Rows:
    async def fetch(sql: str, *arguments: Any) -> list[Any]:
        connection = await asyncpg.connect(server.url)
        try:
            return list(await connection.fetch(sql, *arguments))
        finally:
            await connection.close()

    return fetch


@pytest.fixture
def standby(tmp_path: Path) -> Iterator[str]:
    """The URL of a database on a hot standby."""
    with migrated_server(tmp_path) as server:
        database, port = server.database, server.port
    (tmp_path / "data" / "standby.signal").touch()
    with PostgresServer(tmp_path, port) as server:
        yield server.url_of(database)


async def test_a_standby_is_never_used(standby: str) -> None:
    """What it has may be older than what was acknowledged."""
    connection = await asyncpg.connect(standby)
    assert await connection.fetchval("SELECT pg_is_in_recovery()"), "others can read there"
    await connection.close()
    postgres = Postgres(standby)
    with pytest.raises(PostgresUnavailable):
        await postgres.migrated_to()
    await postgres.close()
