"""GATEWAY_REDIS_REPLICAS=1: what a visitor is told, the replica has. Without it in time there is a 503, and a retry is safe.

Held over HTTP, on a master whose replica is paused: it stays connected and acknowledges nothing.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import msgspec
import pytest
from redis.asyncio import Redis

from gateway.app import Stores
from gateway.dev.servers import redis as redis_module
from gateway.dev.servers.ports import HOST, free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.process import wait_until
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from persistence.redis.keys import Keys
from persistence.redis.scripts import TOUCH, Scripts
from tests.conftest import PutAgent, put_in, settings_for
from tests.support.pods import ServedPod, gated_pod
from tests.support.sse import Stream, kinds, resume, speak
from tests.support.visiting import new_session_id, problem

ANSWER_LIMIT_S = 2.0

Pods = tuple[ServedPod, ServedPod]


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A master of this module's own."""
    config = {"repl-diskless-sync-delay": "0"}
    with RedisServer(tmp_path_factory.mktemp("master"), free_port(), config=config) as server:
        yield server


@pytest.fixture(scope="module")
def replica(redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    config = {"replicaof": f"{HOST} {redis_server.port}"}
    with RedisServer(tmp_path_factory.mktemp("replica"), free_port(), config=config) as server:
        assert wait_until(server.follows, 15), "the replica follows"
        yield server


@pytest.fixture
def settings(redis_server: RedisServer, replica: RedisServer, postgres_server: PostgresServer) -> Settings:
    return with_replicas(settings_for(redis_server.url, postgres_server.url))


def with_replicas(settings: Settings) -> Settings:
    return msgspec.structs.replace(settings, redis_replicas=1)


@pytest.fixture
async def pods(settings: Settings, stores: Stores, put_agent: PutAgent) -> AsyncIterator[Pods]:
    """Two pods, and the agent `shop` whose turns end when the test lets them."""
    await put_agent("shop", graph="gated")
    async with AsyncExitStack() as stack:
        one, other = [await stack.enter_async_context(gated_pod(settings)) for _ in range(2)]
        yield one, other


@contextmanager
def paused(server: RedisServer) -> Iterator[None]:
    """The replica acknowledges nothing meanwhile."""
    server.pause()
    try:
        yield
    finally:
        server.resume()


async def in_time(call: Any) -> httpx.Response:
    """An answer that came within the limit."""
    began = monotonic()
    answer: httpx.Response = await call
    assert monotonic() - began < ANSWER_LIMIT_S
    return answer


def refused(answer: httpx.Response) -> None:
    document = problem(answer, 503, "not_replicated")
    assert document["retryable"] is True
    assert int(answer.headers["retry-after"]) >= 1


async def test_an_answered_turn_is_on_the_replica(pods: Pods, replica: RedisServer) -> None:
    pod, _ = pods
    pod.gated.open()
    session_id = new_session_id()
    async with Redis(port=replica.port) as its:
        for number in range(1, 21):
            assert (await pod.ask(f"Message {number}", session_id)).status_code == 200
            assert await its.hget(pod.stores.keys.session(session_id), "turns") == str(number).encode()


async def lets_a_turn_end_alone(pod: ServedPod, replica: RedisServer, session_id: str) -> httpx.Response:
    """Pauses the replica while a turn runs; what its visitor is told."""
    asked = pod.send("Hello", session_id, message_id="m-1")
    await pod.gated.has_started("Hello")
    replica.pause()
    pod.gated.let_go("Hello")
    return await in_time(asked)


async def test_what_the_replica_lacks_is_refused_and_answered_once_it_is_back(pods: Pods, replica: RedisServer) -> None:
    one, other = pods
    session_id = new_session_id()
    try:
        refused(await lets_a_turn_end_alone(one, replica, session_id))
        for pod in (one, other, other):
            refused(await in_time(pod.ask("Hello", session_id, message_id="m-1")))
    finally:
        replica.resume()
    answer = await other.ask("Hello", session_id, message_id="m-1")
    assert (answer.status_code, answer.json()["response"]) == (200, "Answer to Hello")
    assert answer.json()["metadata"]["replayed"] is True
    assert (one.gated.started, other.gated.started) == (["Hello"], [])
    assert await one.transcript(session_id) == ["Hello", "Answer to Hello"]


async def test_control_a_replay_that_does_not_wait_is_given_before_the_replica_has_it(
    pods: Pods, replica: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def confirm(self: Scripts, key: str) -> None:
        """Waits for nothing."""

    session_id = new_session_id()
    try:
        refused(await lets_a_turn_end_alone(pods[0], replica, session_id))
        monkeypatch.setattr(Scripts, "confirm", confirm)
        assert (await pods[1].ask("Hello", session_id, message_id="m-1")).status_code == 200
    finally:
        replica.resume()


async def test_control_a_wait_without_a_write_before_it_passes_on_another_connection(
    pods: Pods, replica: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pod, session_id = pods[1], new_session_id()
    try:
        refused(await lets_a_turn_end_alone(pods[0], replica, session_id))
        execute = pod.stores.scripts._pool.execute

        async def without_a_write(commands: Any, key: str, timeout_s: float) -> list[Any]:
            left = [("PING",) if TOUCH in command else command for command in commands]
            return await execute(left, key, timeout_s)

        monkeypatch.setattr(pod.stores.scripts._pool, "execute", without_a_write)
        assert (await pod.ask("Hello", session_id, message_id="m-1")).status_code == 200
    finally:
        replica.resume()


async def test_a_new_session_is_not_opened_without_the_replica(pods: Pods, replica: RedisServer) -> None:
    pod, session_id = pods[0], new_session_id()
    pod.gated.open()
    with paused(replica):
        refused(await in_time(pod.ask("Hello", session_id)))
        refused(await in_time(pod.client.post("/api/sessions", json={"agent_id": "shop"})))
    assert pod.gated.started == []
    assert (await pod.ask("Hello", session_id)).status_code == 200


@pytest.fixture
async def full(pods: Pods) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Fills the master, which evicts nothing."""
    client = pods[0].stores.client

    async def fill() -> None:
        await client.config_set("maxmemory-policy", "noeviction")
        await client.config_set("maxmemory", "1000000")

    yield fill
    await client.config_set("maxmemory", "0")
    await client.config_set("maxmemory-policy", "volatile-lru")


@pytest.mark.parametrize("guarded", [True, False], ids=["as it is", "control: a plain write before the wait"])
async def test_what_a_full_redis_still_takes_is_replicated_too(
    pods: Pods, full: Callable[[], Awaitable[None]], monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """A turn that runs is committed, and a session can be erased, though Redis takes no new ones."""
    pod, running, erased = pods[0], new_session_id(), new_session_id()
    if not guarded:
        monkeypatch.setattr("persistence.redis.scripts.TOUCH", TOUCH.replace(" flags=allow-oom", ""))
        pod.stores.sessions.lease_ms = 500
    pod.gated.let_go("first")
    assert (await pod.ask("first", erased)).status_code == 200
    asked = pod.send("Hello", running)
    await pod.gated.has_started("Hello")
    await full()
    pod.gated.let_go("Hello")
    assert (await asked).status_code == (200 if guarded else 503)
    assert (await pod.client.delete(f"/api/sessions/{erased}")).status_code == (204 if guarded else 503)


# ------------------------------------------------------------------------------------------------------------- streams


async def begin_stream(pod: ServedPod, stream: Stream) -> str:
    """Reads up to the turn's start; its id."""
    started = await stream.until("turn.started")
    await pod.gated.has_started(started.data["message"])
    return str(started.data["turn_id"])


async def test_a_stream_shows_no_end_that_the_replica_lacks(pods: Pods, replica: RedisServer) -> None:
    one, other = pods
    session_id = new_session_id()
    async with speak(one.client, session_id, "Hello", message_id="m-1") as live:
        turn_id = await begin_stream(one, live)
        async with resume(other.client, session_id, turn_id, live.cursor) as elsewhere:
            with paused(replica):
                one.gated.let_go("Hello")
                told = (await live.rest())[-1]
                assert (told.kind, told.data["code"], told.data["retryable"]) == ("turn.failed", "not_replicated", True)
                # Readers on either pod that come now, and a retry of the message.
                path = f"/api/chat/shop/turns/{turn_id}/stream"
                for pod in pods:
                    refused(await in_time(pod.client.get(path, params={"session_id": session_id})))
                    body = {"message": "Hello", "session_id": session_id, "message_id": "m-1"}
                    refused(await in_time(pod.client.post("/api/chat/shop/stream", json=body)))
                assert "turn.completed" not in kinds(elsewhere.events + elsewhere._unread)
                reading = asyncio.create_task(elsewhere.rest())
                assert not reading.done()
            assert (await reading)[-1].kind == "turn.completed"
    async with resume(other.client, session_id, turn_id) as late:
        assert (await late.rest())[-1].data["response"] == "Answer to Hello"
    assert one.gated.started == ["Hello"]


async def test_control_a_followed_turn_that_is_not_confirmed_ends_too_early(
    pods: Pods, replica: RedisServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def confirm(self: Scripts, key: str) -> None:
        """Waits for nothing."""

    one, other = pods
    session_id = new_session_id()
    monkeypatch.setattr(Scripts, "confirm", confirm)
    async with speak(one.client, session_id, "Hello") as live:
        turn_id = await begin_stream(one, live)
        async with resume(other.client, session_id, turn_id) as elsewhere:
            with paused(replica):
                one.gated.let_go("Hello")
                assert (await elsewhere.rest())[-1].kind == "turn.completed"


# --------------------------------------------------------------------------------------------------------- end and erase


async def test_an_end_and_an_erasure_are_told_when_the_replica_has_them(pods: Pods, replica: RedisServer) -> None:
    one, other = pods
    one.gated.open()
    ended, erased = new_session_id(), new_session_id()
    for session_id in (ended, erased):
        assert (await one.ask("Hello", session_id)).status_code == 200
    with paused(replica):
        for pod in (one, other, other):
            refused(await in_time(pod.client.post(f"/api/sessions/{ended}/end")))
            refused(await in_time(pod.client.delete(f"/api/sessions/{erased}")))
    assert (await other.client.post(f"/api/sessions/{ended}/end")).status_code == 200
    assert (await other.client.delete(f"/api/sessions/{erased}")).status_code in (204, 404)
    async with Redis(port=replica.port) as its:
        statuses = [await its.hget(one.stores.keys.session(session_id), "status") for session_id in (ended, erased)]
    assert statuses == [b"ended", b"erased"]


async def test_a_session_with_turn_logs_is_erased_though_the_replica_is_late(pods: Pods, replica: RedisServer) -> None:
    """Its erasure takes two calls: the first one only asks for the logs, and waits for nobody."""
    pod, session_id = pods[0], new_session_id()
    pod.gated.open()
    async with speak(pod.client, session_id, "Hello") as stream:
        await stream.rest()
    with paused(replica):
        refused(await in_time(pod.client.delete(f"/api/sessions/{session_id}")))
        assert await pod.stores.client.hget(pod.stores.keys.session(session_id), "status") == b"erased"


# ------------------------------------------------------------------------------------------------------------- cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_module.RedisCluster]:
    ports, replica_ports = ([free_port() for _ in range(3)] for _ in range(2))
    directory: Path = tmp_path_factory.mktemp("cluster")
    # A replica that is paused shall stay one: nobody is to be promoted here.
    config = {"cluster-node-timeout": "60000"}
    with redis_module.RedisCluster(directory, ports, replica_ports=replica_ports, config=config) as cluster:
        yield cluster


def session_on(keys: Keys, cluster: redis_module.RedisCluster, master: int) -> str:
    """A session whose keys are on one of the three masters: the slots are shared out in order."""
    while True:
        session_id = new_session_id()
        slot = cluster.servers[0].ask("CLUSTER", "KEYSLOT", keys.session(session_id))
        assert isinstance(slot, int)
        if slot * 3 // redis_module.CLUSTER_SLOTS == master:
            return session_id


async def test_on_a_cluster_each_master_waits_for_its_own_replica(
    cluster: redis_module.RedisCluster, postgres_server: PostgresServer
) -> None:
    settings = with_replicas(settings_for(cluster.url, postgres_server.url))
    async with gated_pod(settings) as pod:
        pod.gated.open()
        await pod.stores.check()
        await put_in(pod.stores)("shop", graph="gated")
        ids = [session_on(pod.stores.keys, cluster, master) for master in range(3)]
        for session_id in ids:
            assert (await pod.ask("Hello", session_id)).status_code == 200
        with paused(cluster.servers[3]):
            refused(await in_time(pod.ask("Again", ids[0], message_id="m-2")))
            for session_id in ids[1:]:
                assert (await in_time(pod.ask("Again", session_id))).status_code == 200
        answer = await pod.ask("Again", ids[0], message_id="m-2")
        assert (answer.status_code, answer.json()["metadata"]["replayed"]) == (200, True)
