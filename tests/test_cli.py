"""The commands: they refuse to start on what would break the promises, and end in good order."""

import asyncio
import json
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import httpx
import pytest

from gateway.access.tokens import fingerprint
from gateway.app import Stores
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from persistence.model.session import NewSession
from tests.conftest import PutAgent
from tests.support.commands import Done, run_gateway
from tests.support.serving import ADMIN_KEY, SECRET_KEY, GatewayProcess, wait_for
from tests.support.visiting import Rows, new_session_id, post_message, problem

SESSIONS = 300


@pytest.fixture
def variables(settings: Settings) -> dict[str, str]:
    """The environment of a process on the test servers."""
    return {
        "GATEWAY_REDIS_URL": settings.redis_url,
        "GATEWAY_DATABASE_URL": settings.database_url,
        "GATEWAY_SECRET_KEY": SECRET_KEY,
        "GATEWAY_ADMIN_KEY": ADMIN_KEY,
        "GATEWAY_LOG_FORMAT": "json",
    }


async def both(variables: dict[str, str]) -> list[Done]:
    """How a pod and a worker end that may not start."""
    return await asyncio.gather(*(run_gateway(command, variables=variables) for command in ("serve", "worker")))


async def test_a_missing_wrong_or_misspelt_setting_stops_the_start_with_a_sentence(variables: dict[str, str]) -> None:
    without_key = {name: value for name, value in variables.items() if name != "GATEWAY_ADMIN_KEY"}
    cases = (
        ("serve", without_key, "gateway: GATEWAY_ADMIN_KEY is not set"),
        ("serve", variables | {"GATEWAY_PORT": "eighty"}, "gateway: GATEWAY_PORT: expected `int`, got `str`"),
        ("worker", variables | {"GATEWAY_REDIS_URI": "x"}, "gateway: GATEWAY_REDIS_URI is not a setting; did you mean "),
    )
    ended = await asyncio.gather(*(run_gateway(command, variables=given) for command, given, _ in cases))
    for done, (_, _, said) in zip(ended, cases, strict=True):
        assert done.status == 1, done
        assert done.error.startswith(said)
        assert done.error.count("\n") == 1, "one sentence, no traceback"
        assert done.out == ""


async def test_a_redis_that_could_evict_unflushed_answers_is_refused(tmp_path: Path, variables: dict[str, str]) -> None:
    with RedisServer(tmp_path, free_port(), config={"maxmemory-policy": "allkeys-lru"}) as redis:
        elsewhere = variables | {"GATEWAY_REDIS_URL": redis.url}
        for done in await both(elsewhere):
            assert done.status != 0
            (said,) = (line for line in done.error.splitlines() if line.startswith("gateway: "))
            assert "maxmemory-policy is allkeys-lru" in said
            assert "volatile-lru" in said


async def test_another_number_of_partitions_than_the_recorded_one_is_refused(
    stores: Stores, variables: dict[str, str]
) -> None:
    for done in await both(variables | {"GATEWAY_PARTITIONS": "16"}):
        assert done.status != 0
        assert "gateway: gw:meta says partitions = 1, this process is set to 16; set GATEWAY_PARTITIONS" in done.error
    assert await stores.client.hget(stores.keys.meta, "partitions") == b"1"


async def test_a_redis_that_is_not_there_stops_the_start(variables: dict[str, str]) -> None:
    done = await run_gateway("serve", variables=variables | {"GATEWAY_REDIS_URL": f"redis://127.0.0.1:{free_port()}"})
    assert done.status == 1
    assert done.error.splitlines()[-1].startswith("gateway: ")
    assert "Traceback" not in done.error


async def test_migrating_twice_applies_everything_once(postgres_server: PostgresServer) -> None:
    variables = {"GATEWAY_DATABASE_URL": postgres_server.create_database("migrated_by_command")}
    first = await run_gateway("migrate", variables=variables)
    again = await run_gateway("migrate", variables=variables)
    assert (first.status, first.out.splitlines()[0]) == (0, "applied 0001_tables")
    assert (again.status, again.out) == (0, "nothing to apply\n")


async def test_agents_are_put_shown_listed_and_deleted(stores: Stores, variables: dict[str, str]) -> None:
    put = await run_gateway("agents", "put", "shop", "--graph", "echo", variables=variables)
    assert put.status == 0, put.error
    word, name, agent_id = put.out.split()
    assert (word, name) == ("created", "shop")

    site_key = "a site key that nobody is shown again"
    definition = json.dumps({"graph": "echo", "history_window": 4, "site_keys": [site_key]})
    again = await run_gateway("agents", "put", "shop", "--definition", "-", variables=variables, stdin=definition)
    assert again.out == f"replaced shop {agent_id}\n"

    shown_out, listed = await asyncio.gather(
        run_gateway("agents", "show", agent_id, variables=variables), run_gateway("agents", "list", variables=variables)
    )
    shown = json.loads(shown_out.out)
    assert (shown["id"], shown["name"], shown["history_window"]) == (agent_id, "shop", 4)
    assert shown["site_keys"] == [fingerprint(site_key)]
    assert site_key not in shown_out.out + again.out + again.error
    assert (await stores.agents.load("shop")).definition.history_window == 4

    assert [line.split() for line in listed.out.splitlines()] == [[agent_id, "shop", "echo", "active"]]

    deleted = await run_gateway("agents", "delete", "shop", variables=variables)
    assert (deleted.status, deleted.out) == (0, "deleted shop\n")


async def test_what_is_wrong_with_an_agent_is_said_in_a_sentence(stores: Stores, variables: dict[str, str]) -> None:
    shown, put = await asyncio.gather(
        run_gateway("agents", "show", "nobody", variables=variables),
        run_gateway("agents", "put", "shop", "--definition", "-", variables=variables, stdin='{"graf": "echo"}'),
    )
    assert (shown.status, shown.error) == (1, "gateway: There is no such agent\n")
    assert put.status == 1
    assert put.error.startswith("gateway: definition: ")
    assert "graf" in put.error


@pytest.fixture
async def worker_process(
    stores: Stores, put_agent: PutAgent, tmp_path: Path, variables: dict[str, str]
) -> AsyncIterator[GatewayProcess]:
    """A worker that has flushed a record, so that it is known to be at work."""
    process = await GatewayProcess("worker", tmp_path, variables).start()
    await open_sessions(stores, put_agent, 1)
    await wait_for(lambda: "outbox.flushed" in process.output(), f"the first flush: {process.output()}", 30)
    yield process
    if process.process.poll() is None:
        process.kill()


async def open_sessions(stores: Stores, put_agent: PutAgent, count: int) -> None:
    """Opens sessions; each puts a record on the outbox."""
    agent = await put_agent("shop")
    for number in range(count):
        new = NewSession(
            id=f"01900000-0000-7000-8000-{number:06x}{count:06x}",
            session_id=new_session_id(),
            agent_id=agent.id,
            channel="text",
            website_domain="shop.example",
            user_id="",
            ip_address="127.0.0.1",
            user_agent="",
            metadata={},
            minted=True,
            hot_ttl_s=60,
        )
        await stores.sessions.open(new)


async def test_a_worker_told_to_stop_first_flushes_what_is_queued(
    worker_process: GatewayProcess, stores: Stores, put_agent: PutAgent, rows: Rows
) -> None:
    """Paused while the records are queued, so that none of them is flushed before the signal is there."""
    worker_process.signal(signal.SIGSTOP)
    await open_sessions(stores, put_agent, SESSIONS)
    assert len(await rows("SELECT * FROM agent_sessions")) == 1
    worker_process.signal(signal.SIGTERM)
    worker_process.signal(signal.SIGCONT)
    status = await asyncio.to_thread(worker_process.process.wait, 60)
    assert status == 0, worker_process.output()
    assert len(await rows("SELECT * FROM agent_sessions")) == 1 + SESSIONS
    assert await stores.client.xlen(stores.keys.outbox(0)) == 0


async def test_a_worker_that_is_killed_leaves_them_queued(
    worker_process: GatewayProcess, stores: Stores, put_agent: PutAgent, rows: Rows
) -> None:
    """The control: it is the draining that brings them into Postgres."""
    worker_process.signal(signal.SIGSTOP)
    await open_sessions(stores, put_agent, SESSIONS)
    worker_process.kill()
    assert len(await rows("SELECT * FROM agent_sessions")) == 1
    assert await stores.client.xlen(stores.keys.outbox(0)) == SESSIONS


@pytest.fixture
async def pod_process(
    stores: Stores, put_agent: PutAgent, tmp_path: Path, variables: dict[str, str]
) -> AsyncIterator[GatewayProcess]:
    """A pod that answers, with an agent whose graph fails."""
    await put_agent("broken", config={"delay_ms": "not a number"})
    await put_agent("shop")
    process = await GatewayProcess("serve", tmp_path, variables).start()
    yield process
    if process.process.poll() is None:
        process.kill()


async def test_a_log_never_has_what_visitors_say_or_their_secrets(pod_process: GatewayProcess) -> None:
    """Not when all goes well, and not when a graph fails: a traceback's variables hold all of it."""
    session_id, words = new_session_id(), "the-words-of-the-visitor"
    async with httpx.AsyncClient(base_url=pod_process.url, timeout=30) as client:
        assert (await post_message(client, session_id, words)).status_code == 200
        answer = await post_message(client, session_id + "2", words, agent="broken", metadata={"note": words})
        problem(answer, 502, "graph_failed")
    assert await asyncio.to_thread(pod_process.stop) == 0
    said = pod_process.output()
    assert "turn.completed" in said
    assert "graph.failed" in said
    for secret in (words, session_id, SECRET_KEY, ADMIN_KEY):
        assert secret not in said, f"the log has {secret!r}"


async def test_a_port_in_use_stops_a_pod_with_a_sentence(pod_process: GatewayProcess, variables: dict[str, str]) -> None:
    done = await run_gateway("serve", variables=variables | {"GATEWAY_PORT": str(pod_process.port)})
    assert done.status == 1
    assert done.error.splitlines()[-1] == f"gateway: cannot listen on 127.0.0.1:{pod_process.port}"
    assert "Traceback" not in done.error
