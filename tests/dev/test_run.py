"""The development server: what it prints works when pasted, it keeps its data, and it leaves nothing behind."""

import asyncio
import json
import shutil
import signal
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import asyncpg
import httpx
import pytest
import redis

from gateway.dev.run import DevOptions, dev_settings
from gateway.dev.servers.ports import port_is_free
from tests.support.commands import DevServer, Done, paste, processes_of, program_of, run_gateway
from tests.support.serving import wait_for

StartDev = Callable[..., DevServer]

pytestmark = pytest.mark.skipif(not shutil.which("curl"), reason="curl is not installed")


@pytest.fixture
async def dev(tmp_path: Path) -> AsyncIterator[StartDev]:
    """Makes a development server on the test's own folder: `await dev("--no-worker").start()`."""
    made: list[DevServer] = []

    def make(*options: str, folder: str = "data") -> DevServer:
        made.append(DevServer(tmp_path / folder, *options))
        return made[-1]

    yield make
    for server in made:
        server.clear()


async def say_hello(server: DevServer) -> str:
    """Pastes the printed curl line; the id of the session."""
    answered = await paste(server.line("curl "))
    assert answered.status == 0, answered
    answer = json.loads(answered.out)
    assert answer["response"] == "You said: Hello"
    session_id: str = answer["metadata"]["session_id"]
    return session_id


def ttl(server: DevServer, session_id: str) -> int:
    with redis.Redis(port=server.addresses()[0]) as client:
        return int(client.ttl(f"gw:{{0}}:session:{session_id}"))


async def stored(server: DevServer) -> list[str]:
    """What Postgres has of all conversations."""
    connection = await asyncpg.connect(server.addresses()[1])
    try:
        return [row[0] for row in await connection.fetch("SELECT content FROM agent_messages ORDER BY seq")]
    finally:
        await connection.close()


async def shown(server: DevServer, session_id: str) -> list[str]:
    async with httpx.AsyncClient(base_url=server.url) as client:
        answer = await client.get(f"/api/sessions/{session_id}/messages")
        return [message["content"] for message in answer.json()["messages"]]


def check_nothing_is_left(server: DevServer, ports: list[int]) -> None:
    assert processes_of(server.data) == []
    assert [port for port in ports if not port_is_free(port)] == []


async def test_what_it_prints_works_and_it_stops_whole_and_goes_on_where_it_was(dev: StartDev) -> None:
    first = await dev().start()
    session_id = await say_hello(first)
    await wait_for(lambda: stored(first), "the rows are in Postgres", 10)
    assert await stored(first) == ["Hello", "You said: Hello"]
    await wait_for(lambda: ttl(first, session_id) > 0, "the hash gets its TTL", 10)

    redis_port, postgres_url = first.addresses()
    for beginning, expected in ((f"{redis_cli(first)} -p", session_id), (psql(first), "You said: Hello")):
        line = first.line(beginning)
        if shutil.which(program_of(line)):
            pasted = await paste(line)
            assert pasted.status == 0, pasted
            assert expected in pasted.out

    postgres_port = int(postgres_url.split(":")[-1].split("/")[0])
    assert await first.stop(signal.SIGINT) == 0, first.printed
    check_nothing_is_left(first, [first.port, redis_port, postgres_port])

    # Again on the same folder, now without the worker.
    second = await dev("--no-worker").start()
    assert await shown(second, session_id) == ["Hello", "You said: Hello"]
    unflushed = await say_hello(second)
    assert ttl(second, unflushed) == -1
    assert await stored(second) == ["Hello", "You said: Hello"]
    assert "the worker is left out" in second.printed
    assert await second.stop(signal.SIGTERM) == 0, second.printed
    check_nothing_is_left(second, [second.port])


async def test_two_started_at_once_have_servers_of_their_own(dev: StartDev) -> None:
    """Each finds the usual ports free, and making its database takes longer than the other needs to take them."""
    one, other = await asyncio.gather(dev(folder="one").start(), dev(folder="other").start())
    assert set(one.addresses()).isdisjoint(other.addresses())
    for server in (one, other):
        await say_hello(server)
        await wait_for(lambda server=server: stored(server), "the rows are in Postgres", 10)
        assert await stored(server) == ["Hello", "You said: Hello"]


def redis_cli(server: DevServer) -> str:
    return "valkey-cli" if "valkey-cli -p" in server.printed else "redis-cli"


def psql(server: DevServer) -> str:
    (line,) = (line.strip() for line in server.printed.splitlines() if " -c 'SELECT " in line)
    return line.split()[0]


async def test_interrupted_while_it_starts_it_leaves_nothing_behind(dev: StartDev) -> None:
    server = dev().spawn()
    await wait_for((server.data / "postgres").exists, "Postgres is being set up", 60)
    await server.stop(signal.SIGINT)
    assert processes_of(server.data) == []
    assert "Traceback" not in server.printed


def test_it_gives_no_notice_because_there_is_no_balancer(tmp_path: Path) -> None:
    options = DevOptions(port=8000, data=tmp_path, worker=True)
    assert dev_settings(options, {}).drain_notice_s == 0
    assert dev_settings(options, {"GATEWAY_DRAIN_NOTICE_S": "3"}).drain_notice_s == 3


async def test_a_port_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    def start(port: int) -> Coroutine[Any, Any, Done]:
        return run_gateway("dev", "--data", str(tmp_path / "data"), "--port", str(port), variables={})

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        in_use, too_high = await asyncio.gather(start(port), start(70_000))
    assert in_use.status == 1
    assert in_use.error == f"gateway: port {port} is in use: choose another with --port\n"
    assert too_high.status != 0
    assert "Traceback" not in too_high.error
    assert "port" in too_high.error
    assert not (tmp_path / "data").exists()
