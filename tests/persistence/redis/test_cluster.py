"""Everything on a Redis Cluster of three masters: the layer, the worker, and turns over HTTP."""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from typing import Any

import asyncpg
import httpx
import msgspec
import pytest
from redis.asyncio import Redis, RedisCluster
from redis.exceptions import RedisError

from gateway.app import Pod, Stores, build_pod, build_worker
from gateway.dev.servers import redis as redis_module
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.settings import Settings
from persistence.errors import RedisUnavailable
from persistence.history import History
from persistence.housekeeping import Housekeeping
from persistence.model.agents import Agent, AgentDefinition, TurnPolicy
from persistence.model.session import Access
from persistence.model.times import iso
from persistence.postgres.postgres import SessionFilter
from persistence.redis.linking import link_scripts
from persistence.redis.outcomes import Begun, Hot
from persistence.redis.shared_limits import DayUpdate, LimitUpdate, RateUpdate, RunningUpdate, SharedLimits
from persistence.worker import Worker
from tests.conftest import TABLES
from tests.support.layer import ACCESS, AGENT_ID, OPERATOR, POLICY, Layer, new_id, new_turn
from tests.support.rule import all_keys, breaches
from tests.support.serving import ADMIN, ADMIN_KEY, SECRET_KEY, served, wait_for
from tests.support.stored import history_of

Fetch = Callable[..., Awaitable[list[Any]]]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_module.RedisCluster]:
    with redis_module.RedisCluster(tmp_path_factory.mktemp("cluster"), [free_port() for _ in range(3)]) as cluster:
        yield cluster


@pytest.fixture
def settings(cluster: redis_module.RedisCluster, postgres_server: PostgresServer) -> Settings:
    return Settings(
        redis_url=cluster.url,
        database_url=postgres_server.url,
        secret_key=SECRET_KEY,
        admin_key=ADMIN_KEY,
        address_rate_limit="off",
        address_session_limit="off",
        drain_s=5,
    )


@pytest.fixture
async def empty(cluster: redis_module.RedisCluster, settings: Settings) -> None:
    """Empties every node and the tables."""
    for server in cluster.servers:
        node = Redis(port=server.port)
        await node.flushall()
        await node.aclose()
    connection = await asyncpg.connect(settings.database_url)
    await connection.execute(f"TRUNCATE {TABLES}")
    await connection.close()


@pytest.fixture
async def layer(stores: Stores) -> Layer:
    layer = Layer(stores.client, stores.keys, stores.scripts)
    await stores.agent_copies.put(Agent(AGENT_ID, "shop", AgentDefinition(graph="echo", rate_limit=None)))
    return layer


@pytest.fixture
async def housekeeping(settings: Settings, stores: Stores) -> Housekeeping:
    """Every session is idle for long enough."""
    worker = await build_worker(msgspec.structs.replace(settings, session_timeout_s=0.001), stores)
    return worker.housekeeping


@pytest.fixture
def history(stores: Stores) -> History:
    return history_of(stores)


async def many(layer: Layer, count: int = 24, turns: int = 1) -> list[str]:
    """Sessions in many partitions and on every node in turn."""
    client = layer.client
    assert isinstance(client, RedisCluster)
    nodes = client.get_primaries()
    ids: list[str] = []
    while len(ids) < count:
        session_id = new_id()
        if client.get_node_from_key(layer.keys.session(session_id)) == nodes[len(ids) % 3]:
            ids.append(session_id)
            await layer.open(session_id)
            for number in range(turns):
                await layer.chat(session_id, f"message {number}", f"m{number}")
    return ids


# ------------------------------------------------------------------------------------------------------------ the layer


async def test_every_operation_of_the_layer_works(layer: Layer) -> None:
    for session_id in await many(layer, 24, 2):
        sessions = layer.sessions
        begun, turn_id = await layer.begin(session_id)
        assert len(begun.history) == 4
        assert await sessions.renew(session_id, turn_id, begun.fence)
        assert await sessions.abort(session_id, turn_id)
        assert await sessions.reap(session_id) is None
        assert await sessions.time_out(session_id, 0) is True
        await sessions.end(session_id, ACCESS)
        await sessions.erase(session_id, ACCESS)


async def test_all_keys_of_a_session_are_in_one_slot(layer: Layer) -> None:
    await many(layer)
    client = layer.client
    assert isinstance(client, RedisCluster)
    slots: dict[str, set[int]] = {}
    for key in await all_keys(client, layer.keys):
        if "{" in key:
            slots.setdefault(key.split(":")[1], set()).add(client.keyslot(key))
    assert all(len(found) == 1 for found in slots.values())
    assert len(slots) > 1
    assert len({client.keyslot(layer.keys.outbox(partition)) for partition in range(256)}) == 256


@pytest.mark.parametrize("first_line", [True, False])
async def test_a_script_that_touches_a_key_of_another_slot_is_refused(layer: Layer, first_line: bool) -> None:
    """Control: it is the line `#!lua` that makes the server refuse it, for a key that KEYS does not declare."""
    here, there = "gw:{0}:fence", _on_the_same_node(layer.client, "gw:{0}:fence", layer)
    text = "redis.call('SET', ARGV[1], 'x', 'EX', 100) return 'done'"
    text = f"#!lua\n{text}" if first_line else text
    if first_line:
        with pytest.raises(RedisError, match=r"do not hash to the same slot|CROSSSLOT"):
            await layer.client.execute_command("EVAL", text, 1, here, there)
        assert not await layer.client.execute_command("EXISTS", there)
    else:
        assert await layer.client.execute_command("EVAL", text, 1, here, there) == b"done"
        assert await layer.client.execute_command("GET", there) == b"x"
    assert all(script.text.startswith("#!lua") for script in link_scripts().values())


def _on_the_same_node(client: Any, key: str, layer: Layer) -> str:
    """A key of another slot of the same node, which the node could serve."""
    for partition in range(1, 256):
        other = f"gw:{{{partition}}}:limit:test"
        if client.get_node_from_key(other) == client.get_node_from_key(key):
            return other.replace("gw:", "test:")
    raise AssertionError("no other slot on this node")


# ----------------------------------------------------------------------------------------------------------- the worker


async def test_turns_reach_postgres_once_and_in_order(layer: Layer, worker: Worker, rows: Fetch) -> None:
    ids = await many(layer, 24, 3)
    assert await worker.drain(20)
    found = await rows(
        "SELECT s.session_id, s.message_count, array_agg(m.content ORDER BY m.seq) AS contents FROM agent_sessions s "
        "JOIN agent_messages m ON m.session_id = s.id GROUP BY s.id"
    )
    assert {row["session_id"] for row in found} == set(ids)
    for row in found:
        assert row["message_count"] == 6
        assert row["contents"][::2] == ["message 0", "message 1", "message 2"]
    assert all([await layer.has_ttl(session_id) for session_id in ids])


async def test_two_workers_share_the_work(layer: Layer, settings: Settings, rows: Fetch) -> None:
    ids = await many(layer, 24, 2)
    first = Stores(msgspec.structs.replace(settings, worker_name="one"))
    second = Stores(msgspec.structs.replace(settings, worker_name="two"))
    workers = [await build_worker(settings, stores) for stores in (first, second)]
    assert all(await asyncio.gather(*(worker.drain(20) for worker in workers)))
    assert (await rows("SELECT count(*) FROM agent_messages"))[0][0] == len(ids) * 4
    await first.close()
    await second.close()


async def test_an_evicted_session_comes_back_whole(layer: Layer, stores: Stores, worker: Worker, history: History) -> None:
    ids = await many(layer, 12, 2)
    assert await worker.drain(20)
    for session_id in ids:
        before = await layer.read(session_id)
        await layer.evict(session_id)
        page = await history.find_messages(session_id, ACCESS, None, 10)
        assert page is not None
        assert not isinstance(page, str)
        after = await layer.read(session_id)
        assert (after.session, after.turns) == (before.session, before.turns)


async def test_a_poison_record_is_set_aside_and_delays_nobody(
    layer: Layer, stores: Stores, worker: Worker, rows: Fetch
) -> None:
    ids = await many(layer, 6)
    begun, turn_id = await layer.begin(ids[0])
    turn = new_turn(begun, turn_id)
    turn.messages[0].content = "a NUL \0 that Postgres refuses"
    await layer.commit(begun, turn)
    assert await worker.drain(20)
    (letter,) = await stores.outbox.dead_letters()
    assert (letter.session_id, letter.fact) == (ids[0], "t:2")
    assert letter.partition == layer.keys.partition(ids[0])
    assert (await rows("SELECT count(*) FROM agent_messages"))[0][0] == 12
    assert not await layer.has_ttl(ids[0])
    await layer.sessions.erase(ids[0], ACCESS)
    assert not await stores.outbox.dead_letters()
    assert await worker.drain(20)


async def test_a_connection_that_breaks_is_no_foreign_reply(layer: Layer, cluster: redis_module.RedisCluster) -> None:
    """Of two commands in one go, redis-py gives the break back as if it were a reply."""
    session_id = (await layer.open()).session_id
    for _ in range(3):
        for server in cluster.servers:
            async with Redis(port=server.port) as node:
                await node.client_kill_filter(_type="normal", skipme=True)
        await layer.chat(session_id)
    assert layer.scripts.foreign_replies == 0


@pytest.mark.parametrize("field", ["session_id", "fact", "session", "turn"])
@pytest.mark.parametrize("value", [None, b"\xff\xfe"])
async def test_a_record_that_cannot_be_read_is_set_aside_too(
    layer: Layer, stores: Stores, worker: Worker, rows: Fetch, field: str, value: bytes | None
) -> None:
    """Also when it does not tell whose it is: the partition is known, and the others in it must not wait."""
    session_id = await _session_outside_partition_of(layer, "")
    await layer.chat(session_id)
    partition = layer.keys.partition(session_id)
    outbox = layer.keys.outbox(partition)
    ((entry, fields), *_) = reversed(await layer.client.execute_command("XRANGE", outbox, "-", "+"))
    record = {name.decode(): text for name, text in fields.items()}
    if value is None:
        del record[field]
    else:
        record[field] = value
    await layer.client.execute_command("XDEL", outbox, entry)
    await layer.client.execute_command("XADD", outbox, "*", *(part for pair in record.items() for part in pair))
    with suppress(Exception):
        await worker.drain(2)
    dead = await layer.client.execute_command("XLEN", layer.keys.dead(partition))
    waiting = await layer.client.execute_command("XLEN", outbox)
    assert (dead, waiting) == (1, 0)
    assert (await rows("SELECT count(*) FROM agent_sessions"))[0][0] == 1


async def _session_outside_partition_of(layer: Layer, other: str) -> str:
    while True:
        session_id = new_id()
        if layer.keys.partition(session_id) not in (layer.keys.partition(other), layer.keys.partition("\ufffd\ufffd")):
            return (await layer.open(session_id)).session_id


# --------------------------------------------------------------------------------------------------------- housekeeping


async def test_turns_of_dead_pods_are_reaped(layer: Layer, housekeeping: Housekeeping) -> None:
    ids = await many(layer, 12)
    for session_id in ids:
        await layer.begin(session_id)
    assert await housekeeping.reap() == 0
    for session_id in ids[:8]:
        await layer.set(session_id, turn_lease_until=iso(0))
        running = layer.keys.running(layer.keys.partition(session_id))
        await layer.client.execute_command("ZADD", running, 1, session_id)
    assert await housekeeping.reap() == 8
    assert [bool((await layer.fields(session_id))["turn"]) for session_id in ids] == [False] * 8 + [True] * 4


async def test_the_lists_of_live_sessions_are_trimmed(layer: Layer, worker: Worker, housekeeping: Housekeeping) -> None:
    ids = await many(layer, 12)
    assert await worker.drain(20)
    for session_id in ids[:6]:
        await layer.evict(session_id)
    trimmed = 0
    for _ in range(64):  # four partitions a round
        trimmed += await housekeeping.trim()
    assert trimmed == 6
    for number, session_id in enumerate(ids):
        live = layer.keys.live(layer.keys.partition(session_id))
        score = await layer.client.execute_command("ZSCORE", live, session_id)
        assert (score is not None) == (number >= 6)


async def test_idle_sessions_time_out_and_their_history_is_written(
    layer: Layer, worker: Worker, housekeeping: Housekeeping, rows: Fetch
) -> None:
    ids = await many(layer, 9)
    assert await worker.drain(20)
    await layer.evict(ids[0])

    async def idle() -> bool:
        return bool((await rows("SELECT bool_and(last_activity_at < now() - interval '10 ms') FROM agent_sessions"))[0][0])

    await wait_for(idle, "all are idle")
    assert await housekeeping.time_out() == 9
    assert await worker.drain(20)
    found = await rows("SELECT status, ended_at, jsonb_array_length(conversation_history) AS messages FROM agent_sessions")
    assert [(row["status"], row["ended_at"] is not None, row["messages"]) for row in found] == [("timeout", True, 2)] * 9
    await layer.chat(ids[0])
    assert await worker.drain(20)
    (row,) = await rows("SELECT status, ended_at, conversation_history FROM agent_sessions WHERE session_id = $1", ids[0])
    assert tuple(row) == ("active", None, None)


async def test_erased_means_gone_everywhere(layer: Layer, worker: Worker, rows: Fetch) -> None:
    ids = await many(layer, 9)
    assert await worker.drain(20)
    for session_id in ids[:5]:
        await layer.chat(session_id)
        await layer.sessions.erase(session_id, ACCESS)
    assert await worker.drain(20)
    assert {row["session_id"] for row in await rows("SELECT session_id FROM agent_sessions")} == set(ids[5:])
    assert (await rows("SELECT count(*) FROM agent_messages"))[0][0] == 8
    keys = await all_keys(layer.client, layer.keys)
    assert {key.split(":session:")[1] for key in keys if ":session:" in key} == set(ids[5:])


# ------------------------------------------------------------------------------------------------- history and statistics


async def test_the_list_of_sessions_is_whole_page_by_page(layer: Layer, worker: Worker, history: History) -> None:
    ids = await many(layer, 15)
    assert await worker.drain(20)
    for session_id in ids[::3]:
        await layer.evict(session_id)
    ids += await many(layer, 8)
    listed: list[str] = []
    after = None
    while page := (await history.list_sessions(SessionFilter(agent_id=AGENT_ID), after, 5)).sessions:
        listed += [one.session.session_id for one in page]
        after = page[-1].position
        positions = [one.position for one in page]
        assert positions == sorted(positions, reverse=True)
    assert len(listed) == len(ids)
    assert set(listed) == set(ids)


async def test_statistics_count_what_waits_and_what_is_stored(layer: Layer, worker: Worker, history: History) -> None:
    ids = await many(layer, 10)
    assert await worker.drain(20)
    await layer.evict(ids[0])
    await layer.sessions.end(ids[1], ACCESS)
    await many(layer, 8, 2)
    found = await history.load_statistics(AGENT_ID)
    assert (found.total_sessions, found.active_sessions, found.messages, found.exact) == (18, 17, 20 + 32, True)
    assert await worker.drain(20)
    assert await history.load_statistics(AGENT_ID) == found
    nobody = await history.load_statistics("01900000-0000-7000-8000-00000000ffff")
    assert (nobody.total_sessions, nobody.messages) == (0, 0)


async def test_the_backlog_is_counted_over_all_partitions(layer: Layer, stores: Stores) -> None:
    ids = await many(layer, 24)
    backlog = await stores.outbox.backlog(await layer.redis_ms() + 5000)
    assert backlog.records == 48
    assert 5000 <= backlog.lag_ms < 65_000
    assert await stores.outbox.session_ids(100) == (set(ids), 0)
    assert await stores.outbox.session_ids(47) == (None, 0)


# ------------------------------------------------------------------------------------------------------------ over HTTP


async def test_visitors_are_answered(
    client: httpx.AsyncClient, stores: Stores, put_agent: Any, flush: Callable[[], Awaitable[None]], rows: Fetch
) -> None:
    await put_agent("shop")
    ids = [new_id() for _ in range(20)]

    async def visit(session_id: str, text: str) -> dict[str, Any]:
        body = {"message": text, "session_id": session_id, "metadata": {"website_domain": "shop.example"}}
        answer = await client.post("/api/chat/shop/message", json=body)
        assert answer.status_code == 200, answer.text
        found: dict[str, Any] = answer.json()
        return found

    for number in range(3):
        answers = await asyncio.gather(*(visit(session_id, f"{number} of {session_id}") for session_id in ids))
        for session_id, answer in zip(ids, answers, strict=True):
            assert answer["response"] == f"You said: {number} of {session_id}"
            assert answer["metadata"]["history"] == 2 * number
    await flush()
    for key in [stores.keys.session(session_id) for session_id in ids]:
        assert await stores.client.execute_command("DEL", key)
    answers = await asyncio.gather(*(visit(session_id, "back") for session_id in ids))
    assert [answer["metadata"]["history"] for answer in answers] == [6] * len(ids)
    await flush()
    assert (await rows("SELECT count(*) FROM agent_messages"))[0][0] == len(ids) * 8
    stats = (await client.get("/api/sessions/stats", params={"agent_id": "shop"}, headers=ADMIN)).json()
    assert (stats["total_sessions"], stats["active_sessions"], stats["avg_messages_per_session"]) == (20, 20, 8)
    assert (await client.get("/readyz")).status_code == 200


async def test_two_pods_serve_the_same_session(settings: Settings, stores: Stores, put_agent: Any) -> None:
    await put_agent("shop")
    other_stores = Stores(settings)
    pods: list[Pod] = [await build_pod(settings, stores), await build_pod(settings, other_stores)]
    session_id = new_id()
    async with served(pods[0]) as one, served(pods[1]) as two:
        for number in range(6):
            body = {"message": f"{number}", "session_id": session_id, "metadata": {"website_domain": "shop.example"}}
            answer = await (one, two)[number % 2].post("/api/chat/shop/message", json=body)
            assert (answer.status_code, answer.json()["metadata"]["history"]) == (200, 2 * number)
    await other_stores.close()


async def test_a_node_that_dies_takes_only_its_own_sessions_along(
    cluster: redis_module.RedisCluster, stores: Stores, layer: Layer
) -> None:
    """It comes back with all that it had: what was written to its append-only file outlives the process."""
    ids = await many(layer, 24)
    client = layer.client
    assert isinstance(client, RedisCluster)
    dying = cluster.servers[2]

    def is_on(session_id: str) -> bool:
        node: Any = client.get_node_from_key(layer.keys.session(session_id))
        return bool(node.port == dying.port)

    for server in cluster.servers:
        node = Redis(port=server.port)
        await node.config_set("cluster-require-full-coverage", "no")
        await node.aclose()
    here, elsewhere = [one for one in ids if is_on(one)], [one for one in ids if not is_on(one)]
    dying.kill()
    try:
        for session_id in elsewhere:
            outcome = await layer.sessions.begin(session_id, "x", ACCESS, POLICY)
            assert isinstance(outcome, Begun)
            await layer.sessions.abort(session_id, "x")
    finally:
        dying.start()

    async def turns(session_id: str) -> int:
        hot = await stores.hydrator.with_session(session_id, partial(layer.sessions.read, session_id, OPERATOR))
        assert isinstance(hot, Hot)
        return hot.session.turns

    async def back() -> bool:
        with suppress(RedisUnavailable):
            return [await turns(session_id) for session_id in here] == [1] * len(here)
        return False

    await wait_for(back, "the node's sessions are there again", 30)
    assert not await breaches(stores.client, stores.keys)


async def test_limits_of_all_slots_are_told_side_by_side(layer: Layer) -> None:
    limits = SharedLimits(layer.scripts, layer.keys)
    names = [f"address:2001:db8:{number:x}::/64" for number in range(300)]
    told: dict[str, LimitUpdate] = {name: RateUpdate(2, 1000) for name in names}
    told |= {"day:an-agent": DayUpdate(3), "running:an-agent": RunningUpdate("one", 4, 5000)}
    learned, error = await limits.sync(told)
    assert error is None
    assert {learned[name].value for name in names} == {2000}
    learned, error = await limits.sync({"day:an-agent": DayUpdate(1), "running:an-agent": RunningUpdate("two", 1, 5000)})
    assert (learned["day:an-agent"].value, learned["running:an-agent"].value) == (4, 4)
    assert len({layer.keys.partition(name) for name in names}) > 100


async def test_a_rate_limit_and_a_stranger_are_judged_on_every_node(layer: Layer) -> None:
    policy = TurnPolicy(hot_turns=5, hot_ttl_s=60, rate_messages=1, rate_per_s=600)
    for session_id in await many(layer, 12):
        foreign = await layer.sessions.begin(session_id, "x", Access(AGENT_ID, "other.example"), policy)
        assert getattr(foreign, "reason", "") == "foreign"
        await layer.sessions.begin(session_id, "x", ACCESS, policy)
        await layer.sessions.abort(session_id, "x")
        limited = await layer.sessions.begin(session_id, "y", ACCESS, policy)
        assert getattr(limited, "reason", "") == "limited"
