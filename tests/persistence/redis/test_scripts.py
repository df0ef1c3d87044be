"""No reply is used before it has proved whose it is: promise 1 at the place where it is kept."""

import asyncio
import random
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from time import monotonic
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.connection import AbstractConnection
from structlog.testing import capture_logs

from gateway.dev.servers import redis as redis_module
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.redis import RedisServer
from persistence.errors import CommandRefused, ForeignReply, PersistenceError, RedisUnavailable
from persistence.model.session import Session
from persistence.redis.connection import call, connect, connection_options
from persistence.redis.keys import Keys
from persistence.redis.outcomes import Committed, Hot, Opened
from persistence.redis.pool import HeldPool, Server
from persistence.redis.scripts import Scripts
from persistence.redis.sessions import SessionStore
from tests.support.layer import ACCESS, OPERATOR, POLICY, Layer, new_id, new_session, new_turn, redis_layer
from tests.support.proxy import Proxy, proxy_before
from tests.support.serving import ROOT, wait_for
from tests.support.strays import TrustingScripts, careless, leave_reply, question


@pytest.fixture
async def layer(redis_server: RedisServer) -> AsyncIterator[Layer]:
    async with redis_layer(redis_server.url) as layer:
        yield layer


@pytest.fixture
async def proxy(redis_server: RedisServer) -> AsyncIterator[Proxy]:
    async with proxy_before(redis_server.port) as proxy:
        yield proxy


@pytest.fixture
async def behind(layer: Layer, proxy: Proxy) -> AsyncIterator[Layer]:
    """The same layer through the proxy."""
    client = connect(proxy.url)
    yield Layer(client, layer.keys)
    await client.aclose()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_module.RedisCluster]:
    with redis_module.RedisCluster(tmp_path_factory.mktemp("cluster"), [free_port() for _ in range(3)]) as cluster:
        yield cluster


@pytest.fixture
async def on_cluster(cluster: redis_module.RedisCluster) -> AsyncIterator[Layer]:
    client = connect(cluster.url)
    assert isinstance(client, RedisCluster)
    for node in cluster.servers:
        single = Redis(port=node.port)
        await single.flushall()
        await single.aclose()
    yield Layer(client, Keys("gw", 256))
    await client.aclose()


def tells(session: Session) -> str:
    """Whose session it is, by its content and not by its id."""
    return session.user_agent.removeprefix("browser of ")


async def read(layer: Layer, session_id: str) -> Session:
    hot = await layer.sessions.read(session_id, OPERATOR, 10)
    assert isinstance(hot, Hot)
    return hot.session


async def reply_about(layer: Layer, proxy: Proxy, session_id: str) -> bytes:
    """The bytes of a whole reply about a session, as they came over the wire."""
    await read(layer, session_id)  # the first time, the server may have to be given the script
    proxy.replies.clear()
    await read(layer, session_id)
    return b"".join(proxy.replies)


# --------------------------------------------------------------------------------------- a reply that is somebody else's


async def test_a_reply_of_another_session_fails_the_call_and_later_calls_work(behind: Layer, proxy: Proxy) -> None:
    victim, reader = (await behind.open()).session_id, (await behind.open()).session_id
    proxy.plant = await reply_about(behind, proxy, victim)
    proxy.plants = 1
    before = proxy.connections
    with capture_logs() as logs, pytest.raises(ForeignReply):
        await read(behind, reader)
    assert behind.scripts.foreign_replies == 1
    assert [(line["event"], line["script"]) for line in logs] == [("redis.foreign_reply", "read")]
    assert victim not in str(logs)
    assert tells(await read(behind, reader)) == reader
    assert proxy.connections > before, "the old connection, with an unread reply on it, was dropped"
    assert behind.scripts.foreign_replies == 1


async def test_without_the_check_another_session_is_shown(behind: Layer, proxy: Proxy) -> None:
    """Control: the check of the echo is what keeps it out."""
    victim, reader = (await behind.open()).session_id, (await behind.open()).session_id
    proxy.plant = await reply_about(behind, proxy, victim)
    trusting = Layer(behind.client, behind.keys, TrustingScripts(behind.client))
    proxy.plants = 1
    assert tells(await read(trusting, reader)) == victim


@pytest.mark.parametrize("checked", [True, False])
async def test_a_reply_ahead_of_that_to_a_plain_command_is_not_taken_for_it(
    behind: Layer, proxy: Proxy, checked: bool
) -> None:
    """Control: without the check of the echo behind it, it is."""
    session_id = (await behind.open()).session_id
    scripts, live = behind.scripts if checked else TrustingScripts(behind.client), behind.keys.live(0)

    async def ask() -> Any:
        command = ("ZRANGE", live, 0, -1)
        return await scripts.read_and_run(command, "command", "", [live], {"command": "EXISTS"})

    assert await ask() == [session_id.encode()]
    proxy.plant, proxy.plants = b"*1\r\n$5\r\nother\r\n", 1
    if checked:
        with pytest.raises(ForeignReply):
            await ask()
        assert await ask() == [session_id.encode()]
    else:
        assert await ask() == [b"other"]
    assert scripts.foreign_replies == (1 if checked else 0)


async def test_an_older_reply_about_the_same_session_fails_the_call_too(behind: Layer, proxy: Proxy) -> None:
    """The session alone does not prove it: the answer may be to an older question."""
    session_id = (await behind.open()).session_id
    proxy.plant = await reply_about(behind, proxy, session_id)
    await behind.chat(session_id)
    proxy.plants = 1
    with pytest.raises(ForeignReply):
        await read(behind, session_id)
    assert (await read(behind, session_id)).turns == 1


@pytest.mark.parametrize(
    "stray",
    [
        b"+OK\r\n",
        b":1\r\n",
        b"$-1\r\n",
        b"*-1\r\n",
        b"*0\r\n",
        b"*1\r\n$5\r\nbegun\r\n",
        b"*3\r\n:1\r\n:2\r\n:3\r\n",
        b"*3\r\n$4\r\nread\r\n$-1\r\n$-1\r\n",
        b"*2\r\n*1\r\n:1\r\n$1\r\nx\r\n",
        b"$7\r\ndamaged\r\n",
        b"-ERR unknown subcommand 'SETINFO'. Try CLIENT HELP.\r\n",
        b"-WRONGTYPE Operation against a key holding the wrong kind of value\r\n",
    ],
)
async def test_a_reply_of_another_command_fails_the_call(behind: Layer, proxy: Proxy, stray: bytes) -> None:
    session_id = (await behind.open()).session_id
    proxy.plant, proxy.plants = stray, 1
    with pytest.raises(ForeignReply):
        await read(behind, session_id)
    assert tells(await read(behind, session_id)) == session_id


async def test_a_foreign_reply_to_a_write_leaves_repeating_it_safe(behind: Layer, proxy: Proxy) -> None:
    victim, session_id = (await behind.open()).session_id, (await behind.open()).session_id
    proxy.plant = await reply_about(behind, proxy, victim)
    begun, turn_id = await behind.begin(session_id)
    turn = new_turn(begun, turn_id)
    proxy.plants = 1
    with pytest.raises(ForeignReply):
        await behind.commit(begun, turn)
    committed = await behind.commit(begun, turn)
    assert isinstance(committed, Committed)
    assert committed.message_count == 2
    assert (await read(behind, session_id)).turns == 1


async def test_a_foreign_reply_disturbs_calls_beside_it_but_shows_them_nothing(behind: Layer, proxy: Proxy) -> None:
    ids = [(await behind.open()).session_id for _ in range(20)]
    proxy.plant = await reply_about(behind, proxy, ids[0])
    right = 0
    for _ in range(10):
        proxy.plants = 2
        outcomes = await asyncio.gather(*(read(behind, session_id) for session_id in ids), return_exceptions=True)
        for session_id, outcome in zip(ids, outcomes, strict=True):
            if isinstance(outcome, Session):
                assert tells(outcome) == session_id
                right += 1
            else:
                assert isinstance(outcome, RedisUnavailable), repr(outcome)
    proxy.plants = 0
    assert behind.scripts.foreign_replies >= 10
    assert right > 0
    assert [tells(await read(behind, session_id)) for session_id in ids] == ids


# ------------------------------------------------------------------------------- a reply left on an idle connection


async def test_a_connection_with_an_unread_reply_is_not_used(layer: Layer) -> None:
    """RESP2 on a single Redis: the pool looks, so that the echo has nothing to catch."""
    victim, reader = (await layer.open()).session_id, (await layer.open()).session_id
    await leave_reply(layer.client, *question(layer.keys, victim), scripts=layer.scripts)
    assert tells(await read(layer, reader)) == reader
    assert layer.scripts.foreign_replies == 0


async def resp3(layer: Layer, redis_server: RedisServer, kind: type[Scripts]) -> Layer:
    client = Redis.from_url(redis_server.url, **(connection_options() | {"protocol": 3}))
    await client.ping()
    return Layer(client, layer.keys, kind(client))


async def test_where_the_pool_does_not_look_the_echo_does(layer: Layer, redis_server: RedisServer) -> None:
    """The same with RESP3, where redis-py hands such a connection out."""
    victim, reader = (await layer.open()).session_id, (await layer.open()).session_id
    other = await resp3(layer, redis_server, Scripts)
    await leave_reply(other.client, *question(layer.keys, victim), scripts=other.scripts)
    outcome = (await asyncio.gather(read(other, reader), return_exceptions=True))[0]
    if isinstance(outcome, Session):  # a redis-py that looks here too
        assert tells(outcome) == reader
    else:
        assert isinstance(outcome, ForeignReply)
        assert other.scripts.foreign_replies == 1
    assert tells(await read(other, reader)) == reader
    await other.client.aclose()


async def test_an_unread_reply_on_a_cluster_connection_is_caught(on_cluster: Layer) -> None:
    """One that comes after the pool has looked whether there is any."""
    layer = on_cluster
    reader = (await layer.open()).session_id
    victim = await _another_in_the_partition_of(layer, reader)
    await leave_reply(layer.client, *question(layer.keys, victim), scripts=layer.scripts)
    with pytest.raises(ForeignReply):
        await read(layer, reader)
    assert layer.scripts.foreign_replies == 1
    assert tells(await read(layer, reader)) == reader
    assert tells(await read(layer, victim)) == victim
    assert layer.scripts.foreign_replies == 1


async def test_without_the_check_an_unread_reply_on_a_cluster_connection_is_shown(on_cluster: Layer) -> None:
    """Control of the one before."""
    reader = (await on_cluster.open()).session_id
    victim = await _another_in_the_partition_of(on_cluster, reader)
    trusting = Layer(on_cluster.client, on_cluster.keys, TrustingScripts(on_cluster.client))
    await leave_reply(on_cluster.client, *question(on_cluster.keys, victim), scripts=trusting.scripts)
    assert tells(await read(trusting, reader)) == victim


async def _another_in_the_partition_of(layer: Layer, session_id: str) -> str:
    """A session in the same partition, so on the same node."""
    while True:
        other = new_id()
        if layer.keys.partition(other) == layer.keys.partition(session_id):
            return (await layer.open(other)).session_id


# ---------------------------------------------------------------------------------------------------- half is cancelled


async def storm(layer: Layer, commands: int) -> tuple[int, int]:
    """Reads, opens and whole turns of many sessions at once, half of them cancelled at a random moment.

    Returns how many ended rightly and how many were cancelled; a wrong value fails.
    """
    rng = random.Random(1)
    ids = [(await layer.open()).session_id for _ in range(40)]
    cancelled = right = 0

    async def ask(session_id: str) -> None:
        if rng.random() < 0.2:
            opened = await layer.sessions.open(new_session(session_id))
            assert isinstance(opened, Opened)
            assert tells(opened.session) == session_id
        else:
            assert tells(await read(layer, session_id)) == session_id

    for _ in range(commands // 50):
        tasks = [asyncio.create_task(ask(rng.choice(ids))) for _ in range(50)]
        for task in tasks[::2]:
            asyncio.get_running_loop().call_later(rng.random() ** 3 * 0.02, task.cancel)
        if rng.random() < 0.1:
            await flush_scripts(layer.client)
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(outcome, asyncio.CancelledError):
                cancelled += 1
            elif outcome is None:
                right += 1
            else:
                # A call that failed cleanly has shown nobody anything; any other error is a wrong value.
                assert isinstance(outcome, RedisUnavailable | CommandRefused), repr(outcome)
    for session_id in ids:
        with suppress(ForeignReply):  # a reply that was left behind may still be there
            assert tells(await read(layer, session_id)) == session_id
    return right, cancelled


async def flush_scripts(client: Redis | RedisCluster) -> None:
    everywhere = {"target_nodes": RedisCluster.PRIMARIES} if isinstance(client, RedisCluster) else {}
    await client.execute_command("SCRIPT FLUSH", **everywhere)


async def test_with_half_of_all_calls_cancelled_no_value_is_wrong(layer: Layer) -> None:
    right, cancelled = await storm(layer, 50_000)
    assert right > 20_000
    assert cancelled > 2_000
    assert layer.scripts.foreign_replies == 0


async def test_with_half_of_all_calls_cancelled_no_value_is_wrong_on_a_cluster(on_cluster: Layer) -> None:
    right, cancelled = await storm(on_cluster, 50_000)
    assert right > 20_000
    assert cancelled > 2_000
    assert on_cluster.scripts.foreign_replies == 0


@pytest.fixture(params=["single", "cluster"])
async def on_careless(
    request: pytest.FixtureRequest,
    redis_server: RedisServer,
    layer: Layer,
    cluster: redis_module.RedisCluster,
    on_cluster: Layer,
    monkeypatch: pytest.MonkeyPatch,
) -> AsyncIterator[Layer]:
    """Either kind of Redis, by a client whose cancelled calls leave their replies to others."""

    async def unasked(server: Server, connection: AbstractConnection) -> None:
        """A connection that was cut off asks who its server is, and finds the stray reply then."""

    monkeypatch.setattr(Server, "_meet", unasked)
    single = request.param == "single"
    client = await careless((redis_server if single else cluster).url)
    yield Layer(client, (layer if single else on_cluster).keys)
    await client.aclose()


async def test_a_client_that_leaves_replies_behind_shows_nobody_a_wrong_value(on_careless: Layer) -> None:
    right, cancelled = await storm(on_careless, 3000)
    assert right > 300
    assert cancelled > 100
    assert on_careless.scripts.foreign_replies > 0


async def test_without_the_check_such_a_client_shows_wrong_values(on_careless: Layer) -> None:
    """Control of the three before: the same calls, cancelled the same way."""
    trusting = Layer(on_careless.client, on_careless.keys, TrustingScripts(on_careless.client))
    with pytest.raises(AssertionError, match=r"AssertionError\("):
        await storm(trusting, 3000)


async def test_turns_that_are_cancelled_anywhere_are_committed_once_or_not_at_all(layer: Layer) -> None:
    rng = random.Random(2)
    ids = [(await layer.open()).session_id for _ in range(20)]

    async def chat(session_id: str) -> None:
        await layer.chat(session_id, f"of {session_id}")

    for _ in range(15):
        tasks = [asyncio.create_task(chat(session_id)) for session_id in ids]
        for task in tasks[::2]:
            asyncio.get_running_loop().call_later(rng.random() * 0.02, task.cancel)
        await asyncio.gather(*tasks, return_exceptions=True)
        for session_id in ids:
            if turn_id := (await layer.fields(session_id))["turn"]:
                await layer.sessions.abort(session_id, turn_id)
    records = await layer.take()
    for session_id in ids:
        hot = await layer.read(session_id)
        assert [turn.messages[0].content for turn in hot.turns] == [f"of {session_id}"] * hot.session.turns
        assert hot.session.message_count == 2 * hot.session.turns
        mine = [record for record in records if record.session.session_id == session_id and record.turn]
        assert [record.turn for record in mine] == hot.turns
    await layer.outbox.mark_flushed(0, records, 1)


# ------------------------------------------------------------------------------------------------- replies and their lack


async def test_scripts_that_the_server_forgot_are_sent_again(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    for _ in range(3):
        await layer.client.execute_command("SCRIPT FLUSH")
        await layer.chat(session_id)
    assert (await read(layer, session_id)).turns == 3


async def test_a_reply_that_never_comes_fails_the_call_within_two_seconds(behind: Layer, proxy: Proxy) -> None:
    session_id = (await behind.open()).session_id
    begun, turn_id = await behind.begin(session_id)
    turn = new_turn(begun, turn_id)
    proxy.swallowing = True
    started = monotonic()
    with pytest.raises(RedisUnavailable):
        await behind.commit(begun, turn)
    assert monotonic() - started < 2.5, "2 s, and some for a busy machine"
    proxy.swallowing = False
    assert isinstance(await behind.commit(begun, turn), Committed)
    assert (await read(behind, session_id)).turns == 1, "the commit whose reply was lost has happened, once"


async def test_a_stalled_server_fails_many_calls_at_once_within_two_seconds(redis_server: RedisServer, layer: Layer) -> None:
    """More than may run at once: those that wait for their place are bounded as well."""
    session_id = (await layer.open()).session_id
    redis_server.pause()
    try:
        started = monotonic()
        outcomes = await asyncio.gather(*(read(layer, session_id) for _ in range(200)), return_exceptions=True)
        elapsed = monotonic() - started
    finally:
        redis_server.resume()
    assert {type(outcome) for outcome in outcomes} == {RedisUnavailable}
    assert elapsed < 3, "2 s, and some for a busy machine"
    assert tells(await read(layer, session_id)) == session_id


@pytest.mark.parametrize("way", ["a command", "a script"])
async def test_a_call_is_bounded_at_whatever_moment_its_time_is_over(
    redis_server: RedisServer, layer: Layer, way: str
) -> None:
    """In Python 3.11, asyncio.wait_for, with which redis-py sends, loses a cancellation that meets its end."""
    redis_server.pause()
    late = []
    try:
        for steps in range(20):
            client = connect(redis_server.url)
            task: asyncio.Task[Any] = asyncio.create_task(
                call(partial(client.execute_command, "PING"), 60)
                if way == "a command"
                else Scripts(client).command("GET", layer.keys.meta, timeout_s=60)
            )
            for _ in range(steps):
                await asyncio.sleep(0)
            task.cancel()  # as the end of its time does
            done, _ = await asyncio.wait({task}, timeout=0.5)
            if not done:
                late.append(steps)
                task.cancel()
                await asyncio.wait({task})
            await client.aclose()
    finally:
        redis_server.resume()
    assert not late, f"went on when it was cancelled after so many steps: {late}"


async def test_a_stalled_node_of_a_cluster_fails_its_calls_and_no_others(
    cluster: redis_module.RedisCluster, on_cluster: Layer
) -> None:
    ids = [(await on_cluster.open()).session_id for _ in range(12)]
    client = on_cluster.client
    assert isinstance(client, RedisCluster)
    stalled = cluster.servers[1]

    def on_stalled(session_id: str) -> bool:
        node: Any = client.get_node_from_key(on_cluster.keys.session(session_id))
        return bool(node.port == stalled.port)

    assert 0 < sum(map(on_stalled, ids)) < len(ids)
    stalled.pause()
    try:
        started = monotonic()
        outcomes = await asyncio.gather(*(read(on_cluster, session_id) for session_id in ids), return_exceptions=True)
        elapsed = monotonic() - started
    finally:
        stalled.resume()
    assert elapsed < 3, "2 s, and some for a busy machine"
    for session_id, outcome in zip(ids, outcomes, strict=True):
        if on_stalled(session_id):
            assert isinstance(outcome, RedisUnavailable), repr(outcome)
        else:
            assert isinstance(outcome, Session), repr(outcome)

    async def all_back() -> bool:
        found = await asyncio.gather(*(read(on_cluster, session_id) for session_id in ids), return_exceptions=True)
        return all(isinstance(one, Session) for one in found)

    await wait_for(all_back, "the node serves again", 30)


async def test_a_server_that_is_not_there_fails_the_call_within_two_seconds() -> None:
    client = connect(f"redis://127.0.0.1:{free_port()}/0")
    started = monotonic()
    with pytest.raises(RedisUnavailable):
        await SessionStore(Scripts(client), Keys("gw", 1)).begin(new_id(), "a", ACCESS, POLICY)
    assert monotonic() - started < 2.5
    await client.aclose()


async def test_an_error_of_the_read_behind_a_script_is_called_what_it_is(redis_server: RedisServer, layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.client.execute_command("ACL", "SETUSER", "default", "-hgetall")
    try:
        with pytest.raises(PersistenceError, match="hgetall") as caught:
            await layer.begin(session_id)
    finally:
        await layer.client.execute_command("ACL", "SETUSER", "default", "+hgetall")
    assert not isinstance(caught.value, ForeignReply)
    assert layer.scripts.foreign_replies == 0


async def test_more_calls_than_connections_wait_for_each_other(layer: Layer) -> None:
    ids = [(await layer.open()).session_id for _ in range(10)]
    client = layer.client
    assert isinstance(client, Redis)
    found = await asyncio.gather(*(read(layer, ids[number % 10]) for number in range(500)))
    assert [tells(session) for session in found] == [ids[number % 10] for number in range(500)]
    assert isinstance(layer.scripts._pool, HeldPool)
    assert len(layer.scripts._pool.server.idle) <= 64


def test_nothing_stored_is_read_or_written_but_through_the_scripts() -> None:
    """A plain command's reply has no echo. Left are the start, and the leave of a master, where no connection is old
    yet, and wake-ups without data."""
    senders = {"connection.py", "server_check.py", "pool.py", "wakeups.py", "rescue.py"}
    plain = re.compile(r"execute_command|client\.x?[hzls]?(get|set|range|scan|len|del)")
    files = [file for folder in ("persistence", "gateway") for file in (ROOT / folder).rglob("*.py")]
    assert [file.name for file in files if plain.search(file.read_text()) and file.name not in senders] == []
