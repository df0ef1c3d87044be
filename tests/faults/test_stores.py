"""Redis or Postgres stops, dies, hangs or is full, or a worker dies: what was answered arrives once, nobody waits long."""

import asyncio
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from time import monotonic
from typing import Any

import asyncpg
import httpx
import msgspec
import pytest

from gateway.app import Pod, Stores, build_pod, build_worker
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from persistence.errors import PostgresUnavailable, RedisUnavailable
from persistence.worker import Worker
from tests.conftest import TABLES, PutAgent, migrated_server
from tests.support.links import Link
from tests.support.pods import ServedPod, gated_pod, gateway_process
from tests.support.serving import GatewayProcess, served, wait_for
from tests.support.stored import Rows, another, check_tables, contents, fields_of, open_session, read, say, ttl_of

SESSION_ID = "session_in_trouble"
ANSWER_LIMIT_S = 2.0
SLACK_S = 1.0


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    """A Redis of this module's own, that loses nothing when it is killed."""
    config = {"appendfsync": "always"}
    with RedisServer(tmp_path_factory.mktemp("redis"), free_port(), config=config) as server:
        yield server


@pytest.fixture(scope="module")
def postgres_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    """A PostgreSQL of this module's own."""
    with migrated_server(tmp_path_factory.mktemp("postgres")) as server:
        yield server


@pytest.fixture
async def empty(settings: Settings, redis_server: RedisServer, postgres_server: PostgresServer) -> None:
    """Both servers running, whatever the test before left, and empty."""
    await asyncio.to_thread(redis_server.start)
    await asyncio.to_thread(postgres_server.start)
    stores = Stores(settings)
    await stores.client.flushall()
    await stores.client.config_set("maxmemory", "0")
    await stores.client.config_set("maxmemory-policy", "volatile-lru")
    await stores.close()
    connection = await asyncpg.connect(settings.database_url)
    await connection.execute(f"TRUNCATE {TABLES}")
    await connection.close()


@pytest.fixture
async def rows(settings: Settings, empty: None) -> Rows:
    """Looks into Postgres with a new connection each time: the one before may have died."""

    async def fetch(sql: str, *arguments: Any) -> list[Any]:
        connection = await asyncpg.connect(settings.database_url)
        try:
            return list(await connection.fetch(sql, *arguments))
        finally:
            await connection.close()

    return fetch


@pytest.fixture
async def shop(put_agent: PutAgent) -> None:
    await put_agent("shop")


@asynccontextmanager
async def at_work(settings: Settings, name: str = "at-work") -> AsyncIterator[Worker]:
    """A worker that runs in this process meanwhile."""
    async with another(settings, name) as stores:
        worker = await build_worker(settings, stores)
        running = asyncio.create_task(worker.run())
        try:
            yield worker
        finally:
            worker.stop()
            await running


def body_of(session_id: str, message: str = "Hello", **fields: Any) -> dict[str, Any]:
    return {"session_id": session_id, "message": message, **fields}


async def chat(client: httpx.AsyncClient, session_id: str, message: str = "Hello", **fields: Any) -> httpx.Response:
    return await client.post("/api/chat/shop/message", json=body_of(session_id, message, **fields))


async def insist(client: httpx.AsyncClient, session_id: str, message: str) -> None:
    """Sends a message with an id, again and again until it is answered, as the widget does."""

    async def answered() -> bool:
        answer = await chat(client, session_id, message, message_id=message.replace(" ", "-"))
        assert answer.status_code in (200, 409, 503), answer.text
        return answer.status_code == 200

    await wait_for(answered, f"{message} is answered", 40)


async def stored_once(rows: Rows, expected: dict[str, list[str]]) -> bool:
    """Whether Postgres has exactly the questions, with their answers, in order; raises on one too many."""
    try:
        for session_id, questions in expected.items():
            found = await contents(rows, session_id)
            assert max(Counter(found).values(), default=1) == 1, found
            if found != [text for question in questions for text in (question, f"You said: {question}")]:
                return False
    except (OSError, asyncpg.PostgresError):
        return False
    await check_tables(rows)
    return True


def questions(count: int) -> list[str]:
    return [f"Question {number}" for number in range(count)]


# --------------------------------------------------------------------------------------------------------------- Postgres


async def test_without_postgres_chat_goes_on_and_everything_arrives_by_itself(
    settings: Settings,
    stores: Stores,
    client: httpx.AsyncClient,
    shop: None,
    postgres_server: PostgresServer,
    rows: Rows,
) -> None:
    async with at_work(settings):
        assert (await chat(client, SESSION_ID, "Question 0")).status_code == 200
        await asyncio.to_thread(postgres_server.stop)

        for number in range(1, 5):
            assert (await chat(client, SESSION_ID, f"Question {number}")).status_code == 200
        opened = await client.post("/api/sessions", json={"agent_id": "shop"})
        assert opened.status_code == 201
        minted = opened.json()["session_id"]
        headers = {"Authorization": f"Bearer {opened.json()['session_token']}"}
        answer = await client.post("/api/chat/shop/message", json=body_of(minted, "Question 0"), headers=headers)
        assert answer.status_code == 200

        began = monotonic()
        refused = await chat(client, f"{SESSION_ID}_unknown")
        assert (refused.status_code, refused.json()["code"]) == (503, "postgres_unavailable")
        assert monotonic() - began < ANSWER_LIMIT_S + SLACK_S
        assert await ttl_of(stores, SESSION_ID) == -1

        await asyncio.to_thread(postgres_server.start)
        expected = {SESSION_ID: questions(5), minted: questions(1)}
        await wait_for(lambda: stored_once(rows, expected), "everything arrives")
        await wait_for(lambda: settled(stores, SESSION_ID), "the session gets its TTL")
        assert (await chat(client, f"{SESSION_ID}_unknown")).status_code == 200
    assert await stores.outbox.dead_letters() == []


async def test_two_thousand_queued_turns_arrive_by_themselves(
    settings: Settings, stores: Stores, postgres_server: PostgresServer, rows: Rows, tmp_path: Path
) -> None:
    """A worker as a process, running all the time: nobody tells it that Postgres is back."""
    sessions = [f"{SESSION_ID}_{number}" for number in range(100)]
    async with gateway_process("worker", settings, tmp_path) as worker:
        await asyncio.gather(*(open_session(stores, session_id) for session_id in sessions))
        await wait_for(lambda: nothing_waits(stores), "the sessions are in Postgres")
        await asyncio.to_thread(postgres_server.stop)
        for number in range(20):
            await asyncio.gather(*(say(stores, session_id, f"Question {number}") for session_id in sessions))
        await wait_for(lambda: consumers_hold(stores), "the worker has taken some, and cannot flush them")
        assert (await stores.outbox.backlog(0)).records == 2_000

        await asyncio.to_thread(postgres_server.start)
        await wait_for(lambda: nothing_waits(stores), "the outbox and the pending list are empty", 60)
        assert worker.stop() == 0, worker.output()
    assert await stored_once(rows, {session_id: questions(20) for session_id in sessions})
    assert (await stores.outbox.backlog(0)).bytes == 0
    assert all([await settled(stores, session_id) for session_id in sessions])
    assert await stores.outbox.dead_letters() == []


async def nothing_waits(stores: Stores) -> bool:
    return (await stores.outbox.backlog(0)).records == 0 and not await consumers_hold(stores)


async def settled(stores: Stores, session_id: str) -> bool:
    return await ttl_of(stores, session_id) > 0


async def test_killed_again_and_again_under_load_postgres_gets_everything_once(
    settings: Settings,
    stores: Stores,
    client: httpx.AsyncClient,
    shop: None,
    postgres_server: PostgresServer,
    rows: Rows,
) -> None:
    sessions = [f"{SESSION_ID}_{number}" for number in range(8)]
    for session_id in sessions:
        assert (await chat(client, session_id, "Question 0")).status_code == 200
    done = asyncio.Event()

    async def visits(session_id: str) -> int:
        number = 1
        while not done.is_set():
            assert (await chat(client, session_id, f"Question {number}")).status_code == 200
            number += 1
            await asyncio.sleep(0.01)
        return number

    async with at_work(settings, "a"), at_work(settings, "b"):
        visitors = [asyncio.create_task(visits(session_id)) for session_id in sessions]
        for _ in range(2):
            before = len(await rows("SELECT id FROM agent_messages"))
            await wait_for(lambda: grown(rows, before), "flushes are going on", 30)  # noqa: B023
            await asyncio.to_thread(postgres_server.kill)
            await asyncio.to_thread(postgres_server.start)
        done.set()
        expected = {name: questions(count) for name, count in zip(sessions, await asyncio.gather(*visitors), strict=True)}
        await wait_for(lambda: stored_once(rows, expected), "everything arrives", 40)
    assert await stores.outbox.dead_letters() == []


async def grown(rows: Rows, before: int) -> bool:
    return len(await rows("SELECT id FROM agent_messages")) > before


async def test_when_postgres_hangs_only_absent_sessions_notice_and_not_for_long(
    settings: Settings, stores: Stores, shop: None, rows: Rows
) -> None:
    """Connections stay open and nothing comes: as when a firewall drops packets, or the machine under it freezes."""
    await say(stores, f"{SESSION_ID}_warm")
    async with Link(settings.database_url) as link, AsyncExitStack() as stack:
        behind = msgspec.structs.replace(settings, database_url=link.url)
        own = await stack.enter_async_context(another(behind, "behind-a-link"))
        client = await stack.enter_async_context(served(await build_pod(behind, own)))
        assert (await chat(client, SESSION_ID)).status_code == 200
        link.freeze()
        try:
            assert (await chat(client, SESSION_ID)).status_code == 200
            began = monotonic()
            async with asyncio.timeout(8):
                refused = await chat(client, f"{SESSION_ID}_unknown")
            assert refused.json()["code"] == "postgres_unavailable"
            assert monotonic() - began < ANSWER_LIMIT_S + SLACK_S
        finally:
            link.thaw()
        assert (await chat(client, f"{SESSION_ID}_unknown")).status_code == 200


async def test_when_postgres_hangs_in_a_flush_the_worker_gives_up_and_begins_again(
    settings: Settings, stores: Stores, rows: Rows, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("persistence.flusher.FLUSH_TIMEOUT_S", 1.0)
    async with Link(settings.database_url) as link:
        behind = msgspec.structs.replace(settings, database_url=link.url)
        async with another(behind, "behind-a-link") as own:
            worker = await build_worker(behind, own)
            await say(stores, SESSION_ID, "Question 0")
            await worker.flush_once()
            await say(stores, SESSION_ID, "Question 1")
            link.freeze()
            try:
                with pytest.raises(PostgresUnavailable):
                    async with asyncio.timeout(8):
                        await worker.flush_once()
            finally:
                link.thaw()
            assert await worker.drain(10)
    assert await stored_once(rows, {SESSION_ID: questions(2)})


# ------------------------------------------------------------------------------------------------------------------- Redis


async def test_killed_and_started_again_redis_has_every_answered_turn(
    settings: Settings,
    stores: Stores,
    client: httpx.AsyncClient,
    shop: None,
    redis_server: RedisServer,
    rows: Rows,
) -> None:
    sessions = [f"{SESSION_ID}_{number}" for number in range(8)]
    counts = dict.fromkeys(sessions, 0)
    done = asyncio.Event()

    async def visits(session_id: str) -> None:
        while not done.is_set():
            await insist(client, session_id, f"Question {counts[session_id]}")
            counts[session_id] += 1

    async with at_work(settings):
        visitors = [asyncio.create_task(visits(session_id)) for session_id in sessions]
        for _ in range(3):
            before = dict(counts)
            await wait_for(lambda: gone_on(visitors, counts, before), "turns go on", 40)  # noqa: B023
            await asyncio.to_thread(redis_server.kill)
            await asyncio.to_thread(redis_server.start)
        done.set()
        await asyncio.gather(*visitors)
        expected = {session_id: questions(count) for session_id, count in counts.items()}
        await wait_for(lambda: stored_once(rows, expected), "every answered turn arrives", 40)
    for session_id in sessions:
        assert (await read(stores, session_id)).session.turns == counts[session_id]


async def answered_without_redis(
    served_pod: ServedPod, redis_server: RedisServer, *, end: Callable[[], None]
) -> httpx.Response:
    """Has a turn end while Redis is away; what its visitor is told. Redis is back when the pod has tried in vain."""
    tried = 0
    commit, abort = served_pod.stores.sessions.commit, served_pod.stores.sessions.abort

    def counted(operation: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
        async def count(*arguments: Any, **named: Any) -> Any:
            nonlocal tried
            tried += 1
            return await operation(*arguments, **named)

        return count

    served_pod.stores.sessions.commit = counted(commit)  # type: ignore[method-assign, assignment]
    served_pod.stores.sessions.abort = counted(abort)  # type: ignore[method-assign, assignment]
    asked = served_pod.send("Hello", SESSION_ID)
    await served_pod.gated.has_started("Hello")
    await asyncio.to_thread(redis_server.kill)
    end()
    await wait_for(lambda: tried >= 2, "the pod tries again")
    await asyncio.to_thread(redis_server.start)
    return await asked


async def test_a_turn_that_ends_while_redis_is_away_is_committed_when_it_is_back(
    settings: Settings, stores: Stores, put_agent: PutAgent, redis_server: RedisServer
) -> None:
    await put_agent("shop", graph="gated")
    async with gated_pod(settings) as served_pod:
        answer = await answered_without_redis(served_pod, redis_server, end=served_pod.gated.open)
    assert (answer.status_code, answer.json()["response"]) == (200, "Answer to Hello")
    assert (await read(stores, SESSION_ID)).session.turns == 1


async def test_control_without_trying_again_its_answer_is_lost(
    settings: Settings, stores: Stores, put_agent: PutAgent, redis_server: RedisServer
) -> None:
    await put_agent("shop", graph="gated")
    async with gated_pod(settings) as served_pod:

        def end() -> None:
            served_pod.stores.sessions.lease_ms = 0
            served_pod.gated.open()

        answer = await answered_without_redis(served_pod, redis_server, end=end)
    assert (answer.status_code, answer.json()["code"]) == (503, "redis_unavailable")
    assert (await read(stores, SESSION_ID)).session.turns == 0


async def test_a_turn_that_fails_while_redis_is_away_lets_its_session_go_when_it_is_back(
    settings: Settings, stores: Stores, put_agent: PutAgent, redis_server: RedisServer
) -> None:
    await put_agent("shop", graph="gated")
    # The lease alone would keep the session for longer than this test waits.
    async with gated_pod(settings, lease_s=60) as served_pod:
        served_pod.gated.failing.add("Hello")
        answer = await answered_without_redis(served_pod, redis_server, end=served_pod.gated.open)
        assert (answer.status_code, answer.json()["code"]) == (502, "graph_failed")

        async def idle() -> bool:
            # It may be loading its data yet.
            with suppress(RedisUnavailable):
                return not (await read(stores, SESSION_ID)).running
            return False

        await wait_for(idle, "the session is let go")


def gone_on(visitors: list[asyncio.Task[None]], counts: dict[str, int], before: dict[str, int]) -> bool:
    """Whether every visitor got some more answers; raises what a visitor met with."""
    for visitor in visitors:
        if visitor.done():
            visitor.result()
    return all(counts[name] > before[name] + 2 for name in counts)


async def ask_everything(client: httpx.AsyncClient, session_id: str) -> list[tuple[str, httpx.Response, float]]:
    """One request of each kind, all at once, with the time each took."""

    async def timed(method: str, path: str, **options: Any) -> tuple[str, httpx.Response, float]:
        began = monotonic()
        return path, await client.request(method, path, **options), monotonic() - began

    requests = (
        timed("POST", "/api/chat/shop/message", json=body_of(session_id)),
        timed("POST", "/api/sessions", json={"agent_id": "shop"}),
        timed("GET", f"/api/sessions/{session_id}"),
        timed("GET", f"/api/sessions/{session_id}/messages"),
        timed("POST", f"/api/sessions/{session_id}/end"),
        timed("DELETE", f"/api/sessions/{session_id}"),
    )
    return list(await asyncio.gather(*requests))


@pytest.mark.parametrize("how", ["killed", "paused"])
@pytest.mark.parametrize("agent_known", [True, False], ids=["agent-known", "agent-not-known"])
async def test_without_redis_requests_fail_soon(
    pod: Pod, client: httpx.AsyncClient, shop: None, redis_server: RedisServer, how: str, agent_known: bool
) -> None:
    assert (await chat(client, SESSION_ID)).status_code == 200
    if agent_known:
        pod.stores.agents._definitions._clock = lambda: 0.0
        await pod.stores.agents.load("shop")
    else:
        pod.stores.agents._definitions.clear()
    await asyncio.to_thread(redis_server.kill if how == "killed" else redis_server.pause)
    try:
        outcomes = await ask_everything(client, SESSION_ID)
    finally:
        await asyncio.to_thread(redis_server.start if how == "killed" else redis_server.resume)
    for path, answer, _ in outcomes:
        assert (answer.status_code, answer.json()["code"]) == (503, "redis_unavailable"), (path, answer.text)
        assert int(answer.headers["retry-after"]) >= 1
    slow = {path: round(took_s, 1) for path, _, took_s in outcomes if took_s > ANSWER_LIMIT_S + SLACK_S}
    assert not slow, f"longer than {ANSWER_LIMIT_S:g} s: {slow}"
    await wait_for(lambda: answers_again(client), "the pod recovers by itself", 30)


async def answers_again(client: httpx.AsyncClient) -> bool:
    return (await chat(client, f"{SESSION_ID}_again")).status_code == 200


async def test_full_and_unable_to_evict_redis_refuses_cleanly_and_still_reads(
    stores: Stores, client: httpx.AsyncClient, shop: None, worker: Worker, rows: Rows
) -> None:
    assert (await chat(client, SESSION_ID, "Question 0")).status_code == 200
    await stores.client.config_set("maxmemory-policy", "noeviction")
    await stores.client.config_set("maxmemory", "1000000")
    for answer in (await chat(client, SESSION_ID), await client.post("/api/sessions", json={"agent_id": "shop"})):
        assert (answer.status_code, answer.json()["code"]) == (503, "redis_unavailable")
    shown = await client.get(f"/api/sessions/{SESSION_ID}")
    assert (shown.status_code, shown.json()["message_count"]) == (200, 2)
    transcript = await client.get(f"/api/sessions/{SESSION_ID}/messages")
    assert [message["content"] for message in transcript.json()["messages"]] == ["Question 0", "You said: Question 0"]
    assert (await fields_of(stores, SESSION_ID))["turn"] == ""
    assert await worker.drain(5), "a full Redis is flushed all the same"
    await stores.client.config_set("maxmemory", "0")
    assert (await chat(client, SESSION_ID, "Question 1")).status_code == 200
    assert await worker.drain(5)
    assert await stored_once(rows, {SESSION_ID: questions(2)})


async def test_a_turn_that_runs_when_redis_gets_full_is_committed(
    stores: Stores, client: httpx.AsyncClient, put_agent: PutAgent, worker: Worker, rows: Rows
) -> None:
    await put_agent("shop", config={"delay_ms": 700})
    running = asyncio.create_task(chat(client, SESSION_ID, "Question 0"))
    await wait_for(lambda: runs(stores), "the turn runs")
    await stores.client.config_set("maxmemory-policy", "noeviction")
    await stores.client.config_set("maxmemory", "1000000")
    assert (await running).status_code == 200
    assert await worker.drain(5)
    assert await stored_once(rows, {SESSION_ID: questions(1)})


async def runs(stores: Stores) -> bool:
    return bool((await fields_of(stores, SESSION_ID)).get("turn"))


async def test_at_its_limit_redis_evicts_only_what_postgres_has(settings: Settings, stores: Stores, worker: Worker) -> None:
    text = "x" * 2000
    unflushed = [f"{SESSION_ID}_unflushed_{number}" for number in range(20)]
    stored: list[str] = []

    async def fill(count: int) -> None:
        for _ in range(count):
            stored.append(f"{SESSION_ID}_{len(stored)}")
            await say(stores, stored[-1], text)
        assert await worker.drain(10)

    await fill(100)
    for session_id in unflushed:
        await say(stores, session_id, "Question 0")
    # What is flushed from here on must leave those alone: another consumer holds their records.
    async with another(settings, "holder") as holder:
        held = await holder.outbox.take(0, 500)
        assert len(held.entries) == 2 * len(unflushed)
        used = (await stores.client.info("memory"))["used_memory"]
        await stores.client.config_set("maxmemory", str(used + 500_000))
        for _ in range(20):
            await fill(50)
            if (await stores.client.info("stats"))["evicted_keys"] > 200:
                break
    gone = [name for name in stored if not await stores.client.exists(stores.keys.session(name))]
    assert len(gone) > 100, "the limit was reached"
    for session_id in unflushed:
        fields = await fields_of(stores, session_id)
        assert (fields["turns"], "t:1" in fields) == ("1", True)
    await stores.client.config_set("maxmemory", "0")
    for session_id in gone[:20]:
        assert (await read(stores, session_id)).turns[0].messages[0].content == text


# ----------------------------------------------------------------------------------------------------------------- workers


async def test_workers_killed_in_mid_flush_lose_and_double_nothing(
    settings: Settings, stores: Stores, client: httpx.AsyncClient, shop: None, rows: Rows, tmp_path: Path
) -> None:
    environment = {"GATEWAY_REDIS_URL": settings.redis_url, "GATEWAY_DATABASE_URL": settings.database_url}
    workers = [
        GatewayProcess("worker", tmp_path, {**environment, "GATEWAY_WORKER_NAME": f"worker-{number}"}).spawn()
        for number in range(2)
    ]
    sessions = [f"{SESSION_ID}_{number}" for number in range(4)]
    try:
        for number in range(3):
            blocker = await asyncpg.connect(settings.database_url)
            async with blocker.transaction():
                await blocker.execute("LOCK TABLE agent_messages IN ACCESS EXCLUSIVE MODE")
                for session_id in sessions:
                    assert (await chat(client, session_id, f"Question {number}")).status_code == 200
                await wait_for(lambda: consumers_hold(stores), "a worker is in mid-flush", 30)
                await wait_for(lambda: flushes_wait(rows), "its transaction waits", 30)
                holding = [name for name, pending in (await held_by(stores)).items() if pending]
                victim = workers[int(holding[0].removeprefix("worker-"))]
                victim.kill()
            await blocker.close()
            victim.spawn()
        expected = {session_id: questions(3) for session_id in sessions}
        await wait_for(lambda: stored_once(rows, expected), "everything arrives", 40)
    finally:
        statuses = [worker.stop() for worker in workers]
    # One that was told to stop before it had begun has no more to say than that.
    assert set(statuses) <= {0, -signal.SIGTERM}, [worker.output() for worker in workers]
    assert await stores.outbox.dead_letters() == []


async def held_by(stores: Stores) -> dict[str, int]:
    if not await stores.client.xinfo_groups(stores.keys.outbox(0)):
        # The group is made by whoever takes first.
        return {}
    consumers = await stores.client.xinfo_consumers(stores.keys.outbox(0), "flush")
    return {consumer["name"].decode(): consumer["pending"] for consumer in consumers}


async def consumers_hold(stores: Stores) -> bool:
    return any((await held_by(stores)).values())


async def flushes_wait(rows: Callable[..., Awaitable[list[Any]]]) -> bool:
    return bool(await rows("SELECT 1 FROM pg_locks WHERE NOT granted AND relation = 'agent_messages'::regclass"))
