"""The backlog is bounded, in records and in bytes, and what is counted is exact: new turns are refused, nothing else is."""

from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import httpx
import pytest

from gateway.app import Stores
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from persistence.model.agents import TurnPolicy
from persistence.model.session import Record
from persistence.redis.outbox import DeadLetter
from persistence.redis.outcomes import Refused
from tests.conftest import PutAgent
from tests.support.layer import ACCESS, Layer, new_id, new_session, redis_layer
from tests.support.pods import ServedPod, gated_pod, rewrite
from tests.support.rule import breaches
from tests.support.visiting import Flush, new_session_id, problem

PATIENT_WORDS = "Everything takes its time. " * 400


@pytest.fixture
async def layer(redis_server: RedisServer) -> AsyncIterator[Layer]:
    async with redis_layer(redis_server.url) as layer:
        yield layer


async def counted(layer: Layer) -> int:
    """What the counter says."""
    return int(await layer.client.execute_command("GET", layer.keys.outbox_bytes(0)) or 0)


# ----------------------------------------------------------------------------------------------------------- the counter


async def test_the_counter_is_the_bytes_of_every_name_and_value_on_the_outbox(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.chat(session_id, "Grüße aus Köln 🙂")
    entries: Any = await layer.client.xrange(layer.keys.outbox(0))
    sizes = []
    for _, record in entries:
        carried = record.pop(b"bytes")
        sizes.append(sum(len(name) + len(value) for name, value in record.items()))
        assert int(carried) == sizes[-1]
    assert len(sizes) == 2
    assert await counted(layer) == sum(sizes)
    assert (await layer.outbox.backlog(0)).bytes == sum(sizes)
    await layer.flush()
    assert await counted(layer) == 0


async def test_a_record_of_the_version_before_has_no_bytes_and_takes_none_off(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    entries: Any = await layer.client.xrange(layer.keys.outbox(0))
    [(entry, record)] = entries
    await layer.client.execute_command("DEL", layer.keys.outbox(0), layer.keys.outbox_bytes(0))
    del record[b"bytes"]
    await layer.client.xadd(layer.keys.outbox(0), record, id=entry)
    await layer.chat(session_id)
    before = await counted(layer)
    opened, turn = await layer.take()
    assert await layer.outbox.mark_flushed(0, [opened], 1) == 1
    assert await counted(layer) == before > 0
    assert await layer.outbox.mark_flushed(0, [turn], 1) == 1
    assert await counted(layer) == 0


Removal = Callable[[Layer, Record], Coroutine[Any, Any, object]]
REMOVALS: dict[str, Removal] = {
    "mark_flushed": lambda layer, record: layer.outbox.mark_flushed(0, [record], 1),
    "dead_letter": lambda layer, record: layer.outbox.dead_letter(
        0, record.entry, record.session.session_id, record.fact, "a test"
    ),
    "erase": lambda layer, record: layer.sessions.erase(record.session.session_id, ACCESS),
}


async def two_sessions(layer: Layer) -> Record:
    """The only record of a session, with another session's on the outbox: what is wrong does not heal as on an empty one."""
    await layer.open()
    session_id = (await layer.open()).session_id
    (record,) = (record for record in await layer.take() if record.session.session_id == session_id)
    return record


async def retry(layer: Layer) -> DeadLetter:
    (letter,) = await layer.outbox.dead_letters()
    await layer.outbox.retry_dead(letter)
    return letter


@pytest.mark.parametrize("name", REMOVALS)
async def test_whatever_takes_a_record_off_takes_its_bytes_off_once(layer: Layer, name: str) -> None:
    record = await two_sessions(layer)
    for _ in range(2):
        await REMOVALS[name](layer, record)
        assert await breaches(layer.client, layer.keys) == []


@pytest.mark.parametrize("name", REMOVALS)
async def test_a_removal_that_forgets_the_bytes_is_noticed(redis_server: RedisServer, name: str) -> None:
    """Control of the test above, and of the check that runs after every test."""
    async with redis_layer(redis_server.url, checked=False) as layer:
        record = await two_sessions(layer)
        rewrite(layer.scripts, name, lambda text: text.replace("(bytes_key) - bytes, 0)", "(bytes_key), 0)"))
        await REMOVALS[name](layer, record)
        assert "the records on the outbox carry" in (await breaches(layer.client, layer.keys))[0]


async def test_a_dead_letter_that_is_put_back_is_counted_again_and_once(layer: Layer) -> None:
    record = await two_sessions(layer)
    before = await counted(layer)
    await REMOVALS["dead_letter"](layer, record)
    assert await counted(layer) < before
    letter = await retry(layer)
    assert await counted(layer) == before
    assert not await layer.outbox.retry_dead(letter)
    assert await breaches(layer.client, layer.keys) == []


async def test_a_dead_letter_that_is_put_back_uncounted_is_noticed(redis_server: RedisServer) -> None:
    """Control of the test above."""
    async with redis_layer(redis_server.url, checked=False) as layer:
        await REMOVALS["dead_letter"](layer, await two_sessions(layer))
        rewrite(
            layer.scripts, "retry_dead", lambda text: text.replace("'INCRBY', bytes_key, bytes", "'INCRBY', bytes_key, 0")
        )
        await retry(layer)
        assert await breaches(layer.client, layer.keys)


@pytest.mark.parametrize("left_by_hand", ["123456789", "-5", "many", "1e300"])
async def test_a_counter_that_is_wrong_heals_when_the_outbox_is_empty(layer: Layer, left_by_hand: str) -> None:
    await layer.open()
    await layer.client.execute_command("SET", layer.keys.outbox_bytes(0), left_by_hand)
    await layer.flush()
    assert await counted(layer) == 0


async def test_an_outbox_that_an_operator_deleted_refuses_nobody(redis_server: RedisServer) -> None:
    async with redis_layer(redis_server.url, max_backlog_bytes=400) as layer:
        await layer.open()
        assert await layer.sessions.open(new_session(new_id(), minted=True)) == Refused("backlog_full")
        await layer.client.execute_command("DEL", layer.keys.outbox(0))
        await layer.open()
        await layer.flush()
        assert await counted(layer) == 0


# ------------------------------------------------------------------------------------------------------------- the bound


@pytest.mark.parametrize("bounds", [{"max_backlog": 5}, {"max_backlog_bytes": 5 * 500}], ids=["records", "bytes"])
async def test_each_partition_has_its_share_of_the_bound_rounded_up(
    redis_server: RedisServer, bounds: dict[str, Any]
) -> None:
    """Of four partitions each has room for two records: 5 / 4, rounded up, and 2,500 bytes / 4 where each is over 500."""
    async with redis_layer(redis_server.url, partitions=4, **bounds) as layer:

        async def opened(partition: int) -> object:
            session_id = new_id()
            while layer.keys.partition(session_id) != partition:
                session_id = new_id()
            return await layer.sessions.open(new_session(session_id, minted=True))

        for partition in range(4):
            outcomes = [await opened(partition) for _ in range(4)]
            room = [outcome for outcome in outcomes if outcome != Refused("backlog_full")]
            assert len(room) == 2, room
        backlog = await layer.outbox.backlog(0)
        assert backlog.records == 8
        assert backlog.bytes > 5 * 500


async def test_a_message_that_is_refused_has_interrupted_nobody(redis_server: RedisServer) -> None:
    async with redis_layer(redis_server.url, max_backlog=1) as layer:
        session_id = (await layer.open()).session_id
        await layer.flush()
        _, turn_id = await layer.begin(session_id)
        await layer.open()
        impatient = TurnPolicy(hot_turns=25, hot_ttl_s=1800, if_busy="interrupt")
        assert await layer.sessions.begin(session_id, "x", ACCESS, impatient) == Refused("backlog_full")
        assert (await layer.read(session_id)).running == turn_id


# -------------------------------------------------------------------------------------------------------------- over HTTP


@pytest.fixture(params=[{"max_backlog": 4}, {"max_backlog_bytes": 20_000}], ids=["records", "bytes"])
async def pod(request: pytest.FixtureRequest, settings: Settings, stores: Stores, put_agent: PutAgent) -> Any:
    """A pod with room for four records, or for some short ones and one long one."""
    await put_agent("shop", graph="gated")
    async with gated_pod(settings, **request.param) as pod:
        yield pod


async def fill(pod: ServedPod) -> tuple[str, str, Any]:
    """Fills the backlog to its bound: a session with answered turns, another with a turn that runs, and that turn."""
    answered, busy = new_session_id(), new_session_id()
    pod.gated.let_go("Hello", PATIENT_WORDS)
    assert (await pod.ask("Hello", answered, message_id="m1")).status_code == 200
    running = pod.send("Wait for me", busy)
    await pod.gated.has_started("Wait for me")
    assert (await pod.ask(PATIENT_WORDS, answered)).status_code == 200
    return answered, busy, running


def refused(answer: httpx.Response) -> None:
    """Checks that it was refused for the backlog, and told when to come again."""
    document = problem(answer, 503, "backlog_full")
    assert int(answer.headers["retry-after"]) == document["retry_after"] >= 1


async def test_beyond_the_bound_new_turns_are_refused_and_all_else_goes_on(pod: ServedPod, flush: Flush) -> None:
    answered, busy, running = await fill(pod)
    client = pod.client

    refused(await pod.ask("One more", answered))
    refused(await pod.ask("Let me in", busy, if_busy="interrupt"))
    refused(await pod.ask("One more", new_session_id()))
    body = {"message": "One more", "session_id": answered}
    refused(await client.post("/api/chat/shop/stream", json=body))
    refused(await client.post("/api/sessions", json={"agent_id": "shop"}))

    replay = await pod.ask("Hello", answered, message_id="m1")
    assert (replay.status_code, replay.json()["metadata"]["replayed"]) == (200, True)
    assert (await client.get(f"/api/sessions/{answered}")).json()["message_count"] == 4
    assert (await pod.transcript(answered))[:2] == ["Hello", "Answer to Hello"]
    found = await client.post("/api/sessions", json={"agent_id": "shop", "session_id": answered})
    assert found.status_code == 200

    pod.gated.let_go("Wait for me")
    assert (await running).json()["response"] == "Answer to Wait for me"
    refused(await pod.ask("One more", busy))
    assert (await client.post(f"/api/sessions/{answered}/end")).status_code == 200
    refused(await pod.ask("One more", busy))
    assert (await client.delete(f"/api/sessions/{answered}")).status_code == 204

    await flush()
    pod.gated.open()
    assert (await pod.ask("One more", busy)).status_code == 200
    assert await pod.transcript(busy) == ["Wait for me", "Answer to Wait for me", "One more", "Answer to One more"]


async def test_without_the_bound_the_backlog_grows(pod: ServedPod) -> None:
    """Control of the test above."""
    answered, _, _ = await fill(pod)
    for name in ("begin", "open"):
        rewrite(pod.stores.scripts, name, lambda text: text.replace("if backlog_full(", "if false and backlog_full("))
    pod.gated.let_go("One more")
    assert (await pod.ask("One more", answered)).status_code == 200
    assert (await pod.ask("One more", new_session_id())).status_code == 200
    assert (await pod.client.post("/api/sessions", json={"agent_id": "shop"})).status_code == 201


async def test_the_metrics_say_how_much_waits(pod: ServedPod, flush: Flush) -> None:
    await fill(pod)
    entries: Any = await pod.stores.client.xrange(pod.stores.keys.outbox(0))
    waiting = sum(int(record[b"bytes"]) for _, record in entries)
    assert waiting > 20_000
    assert f"gateway_outbox_bytes {float(waiting)}" in (await pod.client.get("/metrics")).text
    pod.gated.open()
    await flush()
