"""One shard dies or hangs: workers go on with the others, and operators see what can be seen."""

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from gateway.app import Stores
from gateway.commands.dead_letters import dead_letters
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from persistence.errors import RedisUnavailable
from persistence.model.agents import Agent
from persistence.redis.partitions import PROBE_S, Partitions, Reached
from persistence.tasks import gather_bounded
from persistence.worker import Worker
from tests.shards.conftest import Dead, healthy_sessions, is_on, sessions_on
from tests.support.serving import ADMIN, wait_for
from tests.support.stored import housekeeping_of
from tests.support.visiting import Rows, say

PACE_S = 1.5
"""What a record of a healthy shard may take to Postgres: a flush, a look whether the dead one is back; a busy machine."""


def on_dying(stores: Stores, dying: RedisServer) -> int:
    """The number of partitions on the shard that dies."""
    return sum(is_on(stores, stores.keys.epoch(partition), dying) for partition in range(stores.keys.partitions))


async def all_or_nothing(self: Partitions, work: Callable[[int], Awaitable[Any]], at_once: int = 32) -> Reached[Any]:
    """How it was before."""

    async def one(partition: int) -> Any:
        return await work(partition)

    return Reached(await gather_bounded(map(one, range(self._keys.partitions)), at_once), [])


async def test_healthy_partitions_are_flushed_at_their_pace(
    client: httpx.AsyncClient, stores: Stores, worker: Worker, shop: Agent, dying: RedisServer, dead: Dead, rows: Rows
) -> None:
    sessions = await healthy_sessions(client, stores, shop, dying)

    async def stored() -> int:
        found = await rows("SELECT count(*) FROM agent_messages m JOIN agent_sessions s ON s.id = m.session_id")
        return int(found[0][0])

    async def flushed(count: int) -> float:
        began = monotonic()

        async def done() -> bool:
            return await stored() == count

        await wait_for(done, f"{count} messages are stored")
        return monotonic() - began

    running = asyncio.create_task(worker.run())
    try:
        await flushed(12)
        async with dead():
            for session_id in sessions:
                await say(client, session_id, agent=shop.name)
            await flushed(24)
            lags = []
            for number in range(5):
                for session_id in sessions:
                    await say(client, session_id, agent=shop.name)
                lags.append(await flushed(36 + 12 * number))
            assert max(lags) < PACE_S, lags
    finally:
        worker.stop()
        await running


async def test_housekeeping_goes_on_with_the_others(
    client: httpx.AsyncClient, stores: Stores, worker: Worker, shop: Agent, dying: RedisServer, dead: Dead, rows: Rows
) -> None:
    here = await sessions_on(client, stores, shop, dying, healthy=False)
    elsewhere = await healthy_sessions(client, stores, shop, dying)
    assert await worker.drain(20)
    housekeeping = housekeeping_of(stores, 0.001)

    async def timed_out() -> set[str]:
        await worker.flush_once()
        return {row["session_id"] for row in await rows("SELECT session_id FROM agent_sessions WHERE status = 'timeout'")}

    async with dead():
        with capture_logs() as logs:
            await housekeeping.run_once()
        told = [line for line in logs if line["event"] == "housekeeping.partitions_unreachable"]
        assert [(line["partitions"], line["log_level"]) for line in told] == [(on_dying(stores, dying), "warning")]
        assert await timed_out() == set(elsewhere)

    async def all_timed_out() -> bool:
        await housekeeping.reap()
        await housekeeping.time_out()
        return await timed_out() == {*here, *elsewhere}

    await wait_for(all_timed_out, "the others time out when their shard is back")


async def test_control_without_passing_over_housekeeping_stops(
    stores: Stores, dead: Dead, monkeypatch: pytest.MonkeyPatch
) -> None:
    housekeeping = housekeeping_of(stores, 0.001)
    await housekeeping.run_once()
    monkeypatch.setattr(Partitions, "each", all_or_nothing)
    async with dead():
        with pytest.raises(RedisUnavailable):
            await housekeeping.run_once()


async def test_a_worker_is_not_drained_while_partitions_are_missing(
    client: httpx.AsyncClient, stores: Stores, worker: Worker, shop: Agent, dying: RedisServer, dead: Dead
) -> None:
    await sessions_on(client, stores, shop, dying, healthy=False)
    async with dead():
        assert not await worker.drain(1)
    assert await worker.drain(20)
    assert (await stores.outbox.backlog(0)).records == 0


async def test_operators_see_what_can_be_seen_and_that_it_is_partial(
    client: httpx.AsyncClient,
    stores: Stores,
    shop: Agent,
    dying: RedisServer,
    dead: Dead,
    flush: Callable[[], Awaitable[None]],
) -> None:
    here = await sessions_on(client, stores, shop, dying, healthy=False)
    await flush()
    elsewhere = await healthy_sessions(client, stores, shop, dying)
    everywhere = {*here, *elsewhere}

    async def look() -> tuple[dict[str, Any], dict[str, Any], dict[str, float]]:
        listed = await client.get("/api/sessions", params={"agent_id": shop.id}, headers=ADMIN)
        totals = await client.get("/api/sessions/stats", params={"agent_id": shop.id}, headers=ADMIN)
        metrics = await client.get("/metrics")
        assert (listed.status_code, totals.status_code, metrics.status_code) == (200, 200, 200)
        lines = [line.split() for line in metrics.text.splitlines() if line.startswith("gateway_") and "{" not in line]
        return listed.json(), totals.json(), {name: float(value) for name, value in lines}

    async def seen_in_full() -> bool:
        listed, totals, shown = await look()
        assert {one["session_id"] for one in listed["sessions"]} == everywhere
        assert (totals["total_sessions"], totals["total_messages"]) == (12, 24)
        return not listed["partial"] and not totals["partial"] and shown["gateway_partitions_unreachable"] == 0

    assert await seen_in_full()
    async with dead():
        listed, totals, shown = await look()
        assert {one["session_id"]: one["live"] for one in listed["sessions"]} == {
            **dict.fromkeys(here, False),
            **dict.fromkeys(elsewhere, True),
        }
        assert (totals["total_sessions"], totals["total_messages"], totals["partial"]) == (12, 24, True)
        assert listed["partial"]
        assert shown["gateway_partitions_unreachable"] == on_dying(stores, dying)
        assert shown["gateway_outbox_records"] == 12
        began = monotonic()
        await client.get("/metrics")
        assert monotonic() - began < PROBE_S + 1, "a shard that is away does not cost time again and again"
    await wait_for(seen_in_full, "all is seen again")


async def test_control_without_passing_over_there_are_no_metrics(
    client: httpx.AsyncClient, dead: Dead, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (await client.get("/metrics")).status_code == 200
    monkeypatch.setattr(Partitions, "each", all_or_nothing)
    async with dead():
        assert (await client.get("/metrics")).status_code == 503


async def test_the_list_of_dead_letters_tells_what_is_missing(
    settings: Settings,
    stores: Stores,
    dying: RedisServer,
    dead: Dead,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GATEWAY_REDIS_URL", settings.redis_url)
    monkeypatch.setenv("GATEWAY_DATABASE_URL", settings.database_url)
    assert await stores.outbox.dead_letters() == []
    missing = on_dying(stores, dying)
    async with dead():
        await dead_letters(argparse.Namespace(retry=False))
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    assert lines == ["no dead letters", f"{missing} of 256 partitions cannot be reached: theirs are missing here"]


async def test_when_no_partition_can_be_reached_that_is_an_error(stores: Stores) -> None:
    async def away(partition: int) -> int:
        raise RedisUnavailable("away")

    with pytest.raises(RedisUnavailable):
        await stores.partitions.each(away)
    assert (await stores.partitions.some([1, 2], away)).unreachable == [1, 2]
    assert (await stores.outbox.backlog(0)).unreachable == 0, "they are asked again at once: nobody else could be"
