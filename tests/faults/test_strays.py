"""A stray reply is detected before any of it is used: promise 1 over HTTP, on either kind of Redis.

On a single Redis redis-py looks for unread data before it hands out a connection, so there the stray comes a moment later,
ahead of the right reply; on a cluster it waits on an idle connection, where nobody looks.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any

import asyncpg
import httpx
import pytest
from redis.asyncio import Redis
from starlette.requests import Request

from gateway.api.entrance import Entrance
from gateway.app import Stores
from gateway.dev.servers import redis as redis_module
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from persistence.errors import ForeignReply
from persistence.history import OPERATOR
from persistence.model.session import Access
from persistence.redis.connection import connect
from persistence.redis.keys import Keys
from persistence.redis.scripts import Scripts
from persistence.redis.wakeups import WakeUps
from tests.conftest import TABLES, PutAgent, settings_for
from tests.support.proxy import Proxy, proxy_before
from tests.support.serving import ADMIN, wait_for
from tests.support.strays import TrustingScripts, leave_reply, question
from tests.support.visiting import new_session_id, post_message, problem, say, transcript

SECRET = "what another visitor said"
Plant = Callable[..., Awaitable[list[asyncio.StreamWriter]]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_module.RedisCluster]:
    with redis_module.RedisCluster(tmp_path_factory.mktemp("cluster"), [free_port() for _ in range(3)]) as cluster:
        yield cluster


@pytest.fixture
async def proxy(redis_server: RedisServer) -> AsyncIterator[Proxy]:
    async with proxy_before(redis_server.port) as proxy:
        yield proxy


@pytest.fixture(params=["single", "cluster"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def settings(kind: str, proxy: Proxy, cluster: redis_module.RedisCluster, postgres_server: PostgresServer) -> Settings:
    return settings_for(proxy.url if kind == "single" else cluster.url, postgres_server.url)


@pytest.fixture
async def empty(redis_server: RedisServer, cluster: redis_module.RedisCluster, settings: Settings) -> None:
    """Empties every node and the tables."""
    for server in (redis_server, *cluster.servers):
        node = Redis(port=server.port)
        await node.flushall()
        await node.aclose()
    connection = await asyncpg.connect(settings.database_url)
    await connection.execute(f"TRUNCATE {TABLES}")
    await connection.close()


@pytest.fixture
def plant(kind: str, proxy: Proxy, stores: Stores) -> Plant:
    """Puts a reply where the next call will read it: the reply to `command`. The sockets that hold it, if any do."""

    async def plant(*command: str | int) -> list[asyncio.StreamWriter]:
        if kind == "cluster":
            return await leave_reply(stores.client, *command, scripts=stores.scripts)
        proxy.replies.clear()
        await stores.client.execute_command(*command)
        proxy.plant, proxy.plants = b"".join(proxy.replies), 1
        return []

    return plant


async def beside(stores: Stores, session_id: str) -> str:
    """Another session in the same partition, so on the same node."""
    while True:
        other = new_session_id()
        if stores.keys.partition(other) == stores.keys.partition(session_id):
            return other


async def two_visitors(client: httpx.AsyncClient, stores: Stores) -> tuple[str, str]:
    """Their sessions, on one node: the first has said Hello, the other one the secret."""
    session_id = new_session_id()
    victim = await beside(stores, session_id)
    for visitor, words in ((session_id, "Hello"), (victim, SECRET)):
        await say(client, visitor, words)
    return session_id, victim


async def foreign_replies(client: httpx.AsyncClient) -> float:
    lines = (await client.get("/metrics")).text.splitlines()
    (value,) = (float(line.split()[1]) for line in lines if line.startswith("gateway_foreign_replies "))
    return value


REQUESTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "message": ("POST", "/api/chat/shop/message", {"json": {"message": "Again", "session_id": "{}"}}),
    "stream": ("POST", "/api/chat/shop/stream", {"json": {"message": "Again", "session_id": "{}"}}),
    "cancel": ("POST", "/api/chat/shop/cancel", {"json": {"session_id": "{}"}}),
    "open": ("POST", "/api/sessions", {"json": {"agent_id": "shop", "session_id": "{}"}}),
    "session": ("GET", "/api/sessions/{}", {}),
    "messages": ("GET", "/api/sessions/{}/messages", {}),
    "end": ("POST", "/api/sessions/{}/end", {}),
    "erase": ("DELETE", "/api/sessions/{}", {}),
    "list": ("GET", "/api/sessions", {"headers": ADMIN}),
    "statistics": ("GET", "/api/sessions/stats", {"headers": ADMIN}),
    "metrics": ("GET", "/metrics", {}),
}


async def send(client: httpx.AsyncClient, name: str, session_id: str) -> httpx.Response:
    method, path, options = REQUESTS[name]
    if "json" in options:
        body = {key: value.replace("{}", session_id) for key, value in options["json"].items()}
        options = options | {"json": body}
    return await client.request(method, path.replace("{}", session_id), **options)


@pytest.mark.parametrize("name", REQUESTS)
async def test_whatever_request_meets_it_fails_with_503_and_the_next_one_works(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, plant: Plant, name: str
) -> None:
    await put_agent("shop")
    session_id, victim = await two_visitors(client, stores)
    sockets = await plant(*question(stores.keys, victim))

    answer = await send(client, name, session_id)
    problem(answer, 503, "redis_unavailable")
    assert int(answer.headers["Retry-After"]) >= 1
    assert SECRET not in answer.text
    assert victim not in answer.text
    assert all(socket.is_closing() for socket in sockets), "the connections were dropped"
    assert await foreign_replies(client) == 1

    # The request itself may have been carried out, its own reply unread. Repeating it is safe.
    if name != "erase":
        assert await transcript(client, session_id) == ["Hello", "You said: Hello"]
    assert (await send(client, name, session_id)).status_code in (200, 204, 404 if name == "erase" else 409)
    assert await foreign_replies(client) == 1


async def test_without_the_check_another_visitors_words_are_shown(
    client: httpx.AsyncClient,
    put_agent: PutAgent,
    stores: Stores,
    plant: Plant,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Control of the test before."""
    await put_agent("shop")
    session_id, victim = await two_visitors(client, stores)
    await plant(*question(stores.keys, victim))

    async def access(entrance: Entrance, request: Request, session_id: str) -> Access:
        """Without the look at the session before, which would take the stray reply."""
        return OPERATOR

    monkeypatch.setattr(Entrance, "access", access)
    monkeypatch.setattr(Scripts, "_belongs", TrustingScripts._belongs)
    assert await transcript(client, session_id) == [SECRET, f"You said: {SECRET}"]
    await stores.scripts.drop_connections()


async def test_a_turn_that_meets_it_at_its_commit_is_answered_and_stored_once(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, plant: Plant, proxy: Proxy
) -> None:
    await put_agent("shop", config={"delay_ms": 300})
    session_id = new_session_id()
    victim = await beside(stores, session_id)
    await say(client, victim, SECRET)
    asking = asyncio.create_task(post_message(client, session_id))

    async def runs() -> bool:
        return bool(await stores.client.hget(stores.keys.session(session_id), "turn"))

    await wait_for(runs, "the turn runs")
    await plant(*question(stores.keys, victim))
    answer = await asking
    assert (answer.status_code, answer.json()["response"]) == (200, "You said: Hello")
    assert await foreign_replies(client) == 1
    assert await transcript(client, session_id) == ["Hello", "You said: Hello"]


# ------------------------------------------------------------------------------------------ what is not one session's


async def find_agent(stores: Stores) -> Any:
    return await stores.agent_copies.find("shop")


async def count_waiting(stores: Stores) -> Any:
    return (await stores.outbox.backlog(0)).records


async def list_dead(stores: Stores) -> Any:
    return await stores.outbox.dead_letters()


async def find_waiting(stores: Stores) -> Any:
    return (await stores.outbox.session_ids(1000)).session_ids


READINGS: dict[str, tuple[Callable[[Stores], Awaitable[Any]], list[str | int]]] = {
    "an agent": (find_agent, ["EVAL", "return ARGV", 0, "id", "01900000-0000-7000-8000-00000000a9e1"]),
    "how many records wait": (count_waiting, ["EVAL", "return 1000", 0]),
    "dead letters": (list_dead, ["EVAL", "return {{'1-1', {'session_id', 'nobody', 'fact', 't:1'}}}", 0]),
    "whose records wait": (find_waiting, ["EVAL", "return {{'1-1', {'session_id', 'nobody'}}}", 0]),
}


async def reading(stores: Stores, name: str) -> Any:
    """What it gives, or the kind of error it ends in."""
    try:
        return await READINGS[name][0](stores)
    except Exception as error:
        return type(error)


@pytest.mark.parametrize("name", READINGS)
async def test_plain_readings_use_no_stray_reply_either(
    stores: Stores, put_agent: PutAgent, client: httpx.AsyncClient, plant: Plant, name: str
) -> None:
    await put_agent("shop")
    await say(client, new_session_id())
    right = await reading(stores, name)
    assert right != ForeignReply
    await plant(*READINGS[name][1])
    assert await reading(stores, name) == ForeignReply
    assert stores.scripts.foreign_replies >= 1
    assert await reading(stores, name) == right


@pytest.mark.parametrize("name", READINGS)
async def test_as_plain_commands_they_would(
    stores: Stores,
    put_agent: PutAgent,
    client: httpx.AsyncClient,
    plant: Plant,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Control: a plain command's reply has nothing in it to look at."""
    await put_agent("shop")
    await say(client, new_session_id())
    right = await reading(stores, name)
    await plant(*READINGS[name][1])
    monkeypatch.setattr(Scripts, "command", TrustingScripts.command)
    wrong = await reading(stores, name)
    await stores.scripts.drop_connections()
    assert wrong not in (right, ForeignReply)


# ------------------------------------------------------------------------------------------------------------- wake-ups


@pytest.mark.parametrize(
    "stray",
    [
        b":1\r\n",
        b"$-1\r\n",
        b"$0\r\n\r\n",
        b"+OK\r\n",
        b"+PONG\r\n",
        b"*0\r\n",
        b"*1\r\n:1\r\n",
        b"*3\r\n:1\r\n:2\r\n:3\r\n",
        b"*3\r\n$7\r\nmessage\r\n$5\r\nother\r\n$5\r\nwords\r\n",
        b"*3\r\n$7\r\nmessage\r\n*1\r\n$1\r\nx\r\n$5\r\nwords\r\n",
        b"*3\r\n$4\r\nread\r\n$7\r\nsession\r\n$5\r\nwords\r\n",
        b"*1\r\n*1\r\n$5\r\nwords\r\n",
        b"-ERR words\r\n",
    ],
)
async def test_a_stray_reply_among_the_wake_ups_ends_none_and_is_none(
    redis_server: RedisServer, proxy: Proxy, stray: bytes
) -> None:
    heard: list[str] = []
    client, publisher, keys = connect(proxy.url), Redis(port=redis_server.port), Keys("gw", 1)
    wakeups = WakeUps(client, keys)
    running = asyncio.create_task(wakeups.run(heard.append))

    async def hears(word: str) -> None:
        async def published() -> bool:
            await publisher.publish(keys.control, word)
            return word in heard

        await wait_for(published, f"{word} is heard")

    await hears("before")
    proxy.inject(stray)
    await hears("after")
    assert set(heard) <= {"", "before", "after"}
    assert not running.done()
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await client.aclose()
    await publisher.aclose()


@pytest.mark.parametrize("kind", ["cluster"], indirect=True)
async def test_a_stray_reply_on_the_connection_that_wake_ups_take_is_none(settings: Settings, stores: Stores) -> None:
    await leave_reply(stores.client, "EVAL", "return ARGV", 0, "message", stores.keys.control)
    client = connect(settings.redis_url)
    publisher = Scripts(client)
    heard: list[str] = []
    running = asyncio.create_task(WakeUps(stores.client, stores.keys).run(heard.append))

    async def published() -> bool:
        await publisher.command("PUBLISH", stores.keys.control, "word")
        return "word" in heard

    await wait_for(published, "what is published is heard")
    assert set(heard) <= {"", "word"}
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await client.aclose()
    await stores.scripts.drop_connections()
