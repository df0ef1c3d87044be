"""Everything behind PgBouncer in transaction mode, with fewer server connections than clients."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import msgspec
import pytest

from gateway.app import Stores, build_pod, build_worker
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PgBouncer, PostgresServer
from gateway.dev.servers.programs import find_pgbouncer
from gateway.settings import Settings
from persistence.postgres.migrate import load_migrations, migrate
from persistence.postgres.postgres import Postgres
from tests.conftest import PutAgent
from tests.support.serving import ADMIN, served, wait_for
from tests.support.stored import Rows, another, check_tables, contents, evict, housekeeping_of, read, say

pytestmark = pytest.mark.skipif(find_pgbouncer() is None, reason="pgbouncer is not installed")

SESSION_ID = "session_behind_pgbouncer"


@pytest.fixture(scope="module", params=[1, 2], ids=["one-connection", "two-connections"])
def bouncer(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, postgres_server: PostgresServer
) -> Iterator[PgBouncer]:
    config = {"default_pool_size": str(request.param), "max_client_conn": "200"}
    directory = tmp_path_factory.mktemp("pgbouncer")
    with PgBouncer(directory, free_port(), postgres_server.url, config=config) as bouncer:
        yield bouncer


@pytest.fixture
def settings(settings: Settings, bouncer: PgBouncer) -> Settings:
    return msgspec.structs.replace(settings, database_url=bouncer.url)


@pytest.fixture
async def rows(postgres_server: PostgresServer, empty: None) -> AsyncIterator[Callable[..., Any]]:
    """Looks into Postgres past PgBouncer, so as not to take part in what is tested."""
    connection = await asyncpg.connect(postgres_server.url)

    async def fetch(sql: str, *arguments: Any) -> list[Any]:
        return list(await connection.fetch(sql, *arguments))

    yield fetch
    await connection.close()


@pytest.fixture
async def client(settings: Settings, stores: Stores) -> AsyncIterator[httpx.AsyncClient]:
    async with served(await build_pod(settings, stores)) as client:
        yield client


async def test_the_server_connections_are_really_shared(settings: Settings, bouncer: PgBouncer) -> None:
    connections = [await asyncpg.connect(bouncer.url, statement_cache_size=0) for _ in range(5)]
    pids = {await connection.fetchval("SELECT pg_backend_pid()") for connection in connections}
    for connection in connections:
        await connection.close()
    assert len(pids) <= 2


async def test_turns_and_flushes_at_once(
    settings: Settings, stores: Stores, client: httpx.AsyncClient, put_agent: PutAgent, rows: Rows
) -> None:
    await put_agent("shop")
    sessions = [f"{SESSION_ID}_{number}" for number in range(12)]

    async def visits(session_id: str) -> None:
        for number in range(5):
            body = {"message": f"Question {number}", "session_id": session_id}
            answer = await client.post("/api/chat/shop/message", json=body)
            assert answer.status_code == 200, answer.text

    async with another(settings, "a") as a, another(settings, "b") as b:
        workers = [await build_worker(settings, own) for own in (a, b)]
        running = [asyncio.create_task(worker.run()) for worker in workers]
        try:
            await asyncio.gather(*map(visits, sessions))
            await wait_for(lambda: is_empty(stores), "everything is flushed")
        finally:
            # A worker that is left running takes the records of every test after this one.
            for worker in workers:
                worker.stop()
            await asyncio.gather(*running)
    expected = [text for number in range(5) for text in (f"Question {number}", f"You said: Question {number}")]
    for session_id in sessions:
        assert await contents(rows, session_id) == expected
    await check_tables(rows)
    assert await stores.outbox.dead_letters() == []


async def is_empty(stores: Stores) -> bool:
    return int(await stores.client.xlen(stores.keys.outbox(0))) == 0


async def test_many_visitors_return_at_once(
    client: httpx.AsyncClient, stores: Stores, put_agent: PutAgent, flush: Any
) -> None:
    await put_agent("shop")
    bodies = [{"message": "Hello", "session_id": f"{SESSION_ID}_{number}"} for number in range(20)]
    for body in bodies:
        assert (await client.post("/api/chat/shop/message", json=body)).status_code == 200
    await flush()
    for body in bodies:
        await evict(stores, body["session_id"])
    answers = await asyncio.gather(*(client.post("/api/chat/shop/message", json=body) for body in bodies))
    assert {answer.status_code for answer in answers} == {200}
    assert {answer.json()["metadata"]["history"] for answer in answers} == {2}
    await flush()


async def test_lists_totals_and_erasing_work(client: httpx.AsyncClient, put_agent: PutAgent, flush: Any, rows: Rows) -> None:
    await put_agent("shop")
    body = {"message": "Hello", "session_id": SESSION_ID}
    assert (await client.post("/api/chat/shop/message", json=body)).status_code == 200
    await flush()
    assert (await client.get("/api/sessions/stats", headers=ADMIN)).json()["total_sessions"] == 1
    assert len((await client.get("/api/sessions", headers=ADMIN)).json()["sessions"]) == 1
    assert (await client.delete(f"/api/sessions/{SESSION_ID}")).status_code == 204
    await flush()
    assert await rows("SELECT id FROM agent_sessions") == []


async def test_evicted_sessions_time_out(stores: Stores, flush: Any, rows: Rows) -> None:
    for number in range(3):
        await say(stores, f"{SESSION_ID}_{number}")
    await flush()
    for number in range(3):
        await evict(stores, f"{SESSION_ID}_{number}")
    await rows("UPDATE agent_sessions SET last_activity_at = now() - interval '2 days'")
    async with asyncio.timeout(10):
        assert await housekeeping_of(stores, 86_400).time_out() == 3
    await flush()
    assert len(await rows("SELECT id FROM agent_sessions WHERE status = 'timeout'")) == 3
    assert (await read(stores, f"{SESSION_ID}_0")).session.status == "timeout"


async def test_migrating_at_once_through_it_applies_once(
    postgres_server: PostgresServer, bouncer: PgBouncer, tmp_path: Path
) -> None:
    database = f"bounced_{bouncer.port}"
    await asyncio.to_thread(postgres_server.create_database, database)
    url = bouncer.url.rpartition("/")[0] + f"/{database}"
    processes = [Postgres(url, timeout_s=30) for _ in range(3)]
    applied = await asyncio.gather(*(migrate(process, load_migrations()) for process in processes))
    assert sorted(map(len, applied)) == [0, 0, len(load_migrations())]
    assert await processes[0].migrated_to() == len(load_migrations())
    for process in processes:
        await process.close()


async def test_no_lock_outlives_its_transaction(stores: Stores, flush: Any, rows: Rows) -> None:
    await say(stores, SESSION_ID)
    await flush()
    await housekeeping_of(stores, 86_400).time_out()
    assert await rows("SELECT 1 FROM pg_locks WHERE locktype = 'advisory'") == []
