"""What /metrics shows of a Redis that has forgotten."""

from typing import Any

import httpx

from gateway.app import Stores
from gateway.metrics import Metrics
from persistence.redis.epochs import Epoch

NAMES = (
    "gateway_redis_epoch",
    "gateway_turns_lost_at_most",
    "gateway_turns_stored_behind",
    "gateway_sessions_erased_again",
    "gateway_sessions_not_compared",
)


def shown(text: str) -> list[float]:
    values = dict(line.split() for line in text.splitlines() if not line.startswith("#") and line.count(" ") == 1)
    return [float(values[name]) for name in NAMES]


async def test_what_redis_has_forgotten_is_counted(stores: Stores, client: httpx.AsyncClient) -> None:
    assert await stores.outbox.dead_letters() == [], "the first call begins an epoch"
    assert shown((await client.get("/metrics")).text) == [1, 0, 0, 0, 0]
    counted: dict[Any, Any] = {"epoch": 7, "lost": 3, "stored_behind": 4, "erased_again": 1, "vouched": 2}
    await stores.client.hset(stores.keys.epoch(0), mapping=counted)
    assert shown((await client.get("/metrics")).text) == [7, 3, 4, 1, 2]


def epoch(partition: int, number: int, *counts: int) -> Epoch:
    return Epoch(partition, number, "server", "2026-01-01T00:00:00.000Z", *counts)


def test_of_a_partition_that_does_not_answer_the_last_numbers_stay() -> None:
    metrics = Metrics()
    metrics.show_epochs([epoch(0, 2, 1, 2, 3, 4), epoch(1, 5, 10, 20, 30, 40)])
    assert shown(metrics.render().decode()) == [5, 11, 33, 44, 22]
    metrics.show_epochs([epoch(0, 3, 2, 2, 3, 4)])
    assert shown(metrics.render().decode()) == [5, 12, 33, 44, 22]
