"""Liveness, readiness, metrics."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from time import time
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from gateway.api.answers import answer
from gateway.api.endpoint import Endpoint
from gateway.metrics import Metrics
from persistence.errors import PersistenceError
from persistence.redis.epochs import Epochs
from persistence.redis.outbox import Outbox
from persistence.redis.partitions import Partitions
from persistence.redis.scripts import Scripts

Health = Literal["ok", "down"]


class Alive(msgspec.Struct):
    """The process answers."""

    status: Annotated[Literal["ok"], Meta(description="Always `ok`")] = "ok"


class Readiness(msgspec.Struct):
    """The state of a pod and of its stores."""

    ready: Annotated[bool, Meta(description="Whether a balancer may send requests here: Redis is up, the pod not draining")]
    redis: Annotated[Health, Meta(description="Whether Redis answers")]
    postgres: Annotated[Health, Meta(description="Whether Postgres answers; chat goes on without it")]
    draining: Annotated[bool, Meta(description="Whether the pod is shutting down")]


class OpsApi:
    """The calls for balancers and monitors."""

    def __init__(
        self,
        check_redis: Callable[[], Awaitable[Any]],
        check_postgres: Callable[[], Awaitable[Any]],
        is_draining: Callable[[], bool],
        outbox: Outbox,
        epochs: Epochs,
        partitions: Partitions,
        scripts: Scripts,
        metrics: Metrics,
    ) -> None:
        self._check_redis = check_redis
        self._check_postgres = check_postgres
        self._is_draining = is_draining
        self._outbox = outbox
        self._epochs = epochs
        self._partitions = partitions
        self._scripts = scripts
        self._metrics = metrics

    async def alive(self, request: Request) -> Response:
        """GET /healthz"""
        return answer(Alive())

    async def ready(self, request: Request) -> Response:
        """GET /readyz"""
        redis, postgres = await asyncio.gather(_health(self._check_redis), _health(self._check_postgres))
        draining = self._is_draining()
        ready = redis == "ok" and not draining
        return answer(Readiness(ready, redis, postgres, draining), 200 if ready else 503)

    async def metrics(self, request: Request) -> Response:
        """GET /metrics: of the partitions that can be reached; 503 when none can."""
        backlog = await self._outbox.backlog(int(time() * 1000))
        self._metrics.outbox_records.set(backlog.records)
        self._metrics.outbox_bytes.set(backlog.bytes)
        self._metrics.outbox_lag_seconds.set(backlog.lag_ms / 1000)
        self._metrics.dead_letters.set(backlog.dead)
        epochs = await self._partitions.each(partial(self._epochs.read, self._scripts))
        self._metrics.show_epochs(epochs.results)
        self._metrics.partitions_unreachable.set(max(backlog.unreachable, len(epochs.unreachable)))
        self._metrics.foreign_replies.set(self._scripts.foreign_replies)
        return Response(self._metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")

    def endpoints(self) -> Sequence[Endpoint]:
        """The calls for balancers and monitors."""
        return [
            Endpoint("GET", "/healthz", self.alive, "Whether the process answers", {200: Alive}),
            Endpoint(
                "GET",
                "/readyz",
                self.ready,
                "Whether the pod can serve",
                {200: Readiness, 503: Readiness},
                description="For balancers: 503 tells them to send no more requests here.",
            ),
            Endpoint("GET", "/metrics", self.metrics, "Prometheus metrics", {200: "text/plain"}, (503,)),
        ]


async def _health(check: Callable[[], Awaitable[Any]]) -> Health:
    try:
        await check()
    except PersistenceError:
        return "down"
    return "ok"
