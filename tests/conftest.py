"""Real servers, started once; an empty Redis and empty tables for every test; the one rule checked after each."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import asyncpg
import httpx
import pytest
import structlog

from gateway.app import Pod, Stores, build_pod, build_worker
from gateway.dev.servers.ports import free_port, share_ports
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer
from gateway.logs import configure_logs
from gateway.settings import Settings
from persistence.model.agents import Agent, AgentDefinition
from persistence.postgres.migrate import load_migrations, migrate
from persistence.postgres.postgres import Postgres
from persistence.worker import Worker
from tests.support.hangs import HangGuard
from tests.support.rule import breaches
from tests.support.selection import quick, rank, takes_long
from tests.support.serving import ADMIN_KEY, SECRET_KEY, served

# As in production: the same tracebacks, without the time that pretty ones take.
configure_logs("json", "info")
# Loggers that are made once and kept could not be captured.
structlog.configure(cache_logger_on_first_use=False)
LOGS = structlog.get_config()

# Test processes that run side by side start servers and pods all the time: each has ports of its own, and so have several
# runs on one machine, most of the time.
RUNS = 4
workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
worker_number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % workers
run_number = crc32(os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid())).encode()) % RUNS
share_ports(run_number * workers + worker_number, RUNS * workers)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="leave out what takes long (tests/support/selection.py)")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(HangGuard())


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    return True if config.getoption("--quick") and takes_long(collection_path) else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """The longest files first, so that the test processes end at the same time."""
    items.sort(key=lambda item: rank(item.path))
    if config.getoption("--quick"):
        config.hook.pytest_deselected(items=[item for item in items if not quick(item)])
        items[:] = filter(quick, items)


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """What a test does to the configuration of the logs is undone: drawn tracebacks take a second each."""
    yield
    structlog.configure(**LOGS)


TABLES = "agents, agent_sessions, agent_messages, erased_sessions, partition_marks"


@contextmanager
def migrated_server(directory: Path) -> Iterator[PostgresServer]:
    """A PostgreSQL with a migrated database."""
    with PostgresServer(directory, free_port(), database="gateway") as server:

        async def prepare() -> None:
            postgres = Postgres(server.url, timeout_s=30)
            await migrate(postgres, load_migrations())
            await postgres.close()

        asyncio.run(prepare())
        yield server


@pytest.fixture(scope="session")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A real Redis (or Valkey), AOF on."""
    with RedisServer(tmp_path_factory.mktemp("redis"), free_port()) as server:
        yield server


@pytest.fixture(scope="session")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A real PostgreSQL with a migrated database."""
    with migrated_server(tmp_path_factory.mktemp("postgres")) as server:
        yield server


def settings_on(redis_server: RedisServer, postgres_server: PostgresServer) -> Settings:
    return settings_for(redis_server.url, postgres_server.url)


def settings_for(redis_url: str, database_url: str) -> Settings:
    """What every pod and worker of the tests is told, unless a test says otherwise."""
    return Settings(
        redis_url=redis_url,
        database_url=database_url,
        secret_key=SECRET_KEY,
        admin_key=ADMIN_KEY,
        address_rate_limit="off",
        address_session_limit="off",
        # A proxy on this machine is believed: tests call from any address.
        trusted_proxies="127.0.0.1",
        drain_s=5,
    )


@pytest.fixture
def settings(redis_server: RedisServer, postgres_server: PostgresServer) -> Settings:
    """Settings on the test servers. A test that wants others overrides this fixture or builds its own Stores."""
    return settings_on(redis_server, postgres_server)


@pytest.fixture
async def empty(settings: Settings) -> None:
    """Empties both stores before the test."""
    await empty_stores(settings)


async def empty_stores(settings: Settings) -> None:
    stores = Stores(settings)
    await stores.client.flushall()
    await stores.close()
    connection = await asyncpg.connect(settings.database_url)
    await connection.execute(f"TRUNCATE {TABLES}")
    await connection.close()


@pytest.fixture
async def stores(settings: Settings, empty: None) -> AsyncIterator[Stores]:
    """Everything on the two stores; after the test the one rule is checked."""
    async with checked_stores(settings) as stores:
        yield stores


@asynccontextmanager
async def checked_stores(settings: Settings) -> AsyncIterator[Stores]:
    stores = Stores(settings)
    await stores.check()
    yield stores
    wrong = await breaches(stores.client, stores.keys)
    await stores.close()
    assert not wrong, "; ".join(wrong)


@pytest.fixture
async def pod(settings: Settings, stores: Stores) -> Pod:
    """A pod that is not served."""
    return await build_pod(settings, stores)


@pytest.fixture
async def client(pod: Pod) -> AsyncIterator[httpx.AsyncClient]:
    """An HTTP client of a served pod."""
    async with AsyncExitStack() as stack:
        yield await stack.enter_async_context(served(pod))


@pytest.fixture
async def worker(settings: Settings, stores: Stores) -> Worker:
    """A worker that works when told to."""
    return await build_worker(settings, stores)


@pytest.fixture
def flush(worker: Worker) -> Callable[[], Awaitable[None]]:
    """Brings all that waits into Postgres."""

    async def flush() -> None:
        assert await worker.drain(10), "the outbox did not drain"

    return flush


@pytest.fixture
async def rows(settings: Settings, empty: None) -> AsyncIterator[Callable[..., Awaitable[list[Any]]]]:
    """Looks into Postgres directly: `await rows("SELECT ...", argument)`."""
    connection = await asyncpg.connect(settings.database_url)

    async def fetch(sql: str, *arguments: Any) -> list[Any]:
        return list(await connection.fetch(sql, *arguments))

    yield fetch
    await connection.close()


PutAgent = Callable[..., Awaitable[Agent]]


@pytest.fixture
def put_agent(stores: Stores) -> PutAgent:
    """Makes an agent: `await put_agent("shop", config={...})`; on `echo` unless told otherwise."""
    return put_in(stores)


def put_in(stores: Stores) -> PutAgent:
    async def put(name: str = "shop", **fields: Any) -> Agent:
        agent, _ = await stores.agents.put(name, AgentDefinition(**{"graph": "echo", "rate_limit": None, **fields}))
        return agent

    return put
