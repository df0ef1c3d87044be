"""Liveness, readiness, metrics."""

import asyncio
import re
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

_CODES = {
    "ReadOnlyError": "READONLY",
    "no master": "READONLY",
    "a replica": "READONLY",
    "OutOfMemoryError": "OOM",
    "NoPermissionError": "NOPERM",
    "ACL failure": "NOPERM",
    "BusyLoadingError": "LOADING",
    "ClusterDownError": "CLUSTERDOWN",
}
_CODE = re.compile("|".join((*_CODES, "NOREPLICAS", "MISCONF", "NOAUTH", "NOPERM", "OOM", "READONLY")))
"""What errors of Redis say in the words of redis-py, of the pool, or of Redis itself."""

Health = Literal["ok", "down"]


class Alive(msgspec.Struct):
    """The process answers."""

    status: Annotated[Literal["ok"], Meta(description="Always `ok`")] = "ok"


class Readiness(msgspec.Struct, omit_defaults=True):
    """The state of a pod and of its stores."""

    ready: Annotated[
        bool, Meta(description="Whether a balancer may send requests here: Redis takes turns, the pod not draining")
    ]
    redis: Annotated[Health, Meta(description="Whether Redis takes what a turn needs: a write, and a publication")]
    postgres: Annotated[Health, Meta(description="Whether Postgres answers; chat goes on without it")]
    draining: Annotated[bool, Meta(description="Whether the pod is shutting down")]
    reason: Annotated[
        str | None, Meta(description="Why Redis takes no turn, in a word of its own: `NOREPLICAS`, `OOM` …")
    ] = None
    tasks: Annotated[list[str], Meta(description="The background tasks of the pod that are down")] = []


class OpsApi:
    """The calls for balancers and monitors."""

    def __init__(
        self,
        check_redis: Callable[[], Awaitable[Any]],
        check_postgres: Callable[[], Awaitable[Any]],
        is_draining: Callable[[], bool],
        tasks_down: Callable[[], list[str]],
        outbox: Outbox,
        epochs: Epochs,
        partitions: Partitions,
        scripts: Scripts,
        metrics: Metrics,
    ) -> None:
        self._check_redis = check_redis
        self._check_postgres = check_postgres
        self._is_draining = is_draining
        self._tasks_down = tasks_down
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
        redis, postgres = await asyncio.gather(_failure(self._check_redis), _failure(self._check_postgres))
        draining, down = self._is_draining(), self._tasks_down()
        ready = redis is None and not draining and not down
        readiness = Readiness(
            ready,
            "ok" if redis is None else "down",
            "ok" if postgres is None else "down",
            draining,
            _reason(redis),
            down,
        )
        return answer(readiness, 200 if ready else 503)

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


async def _failure(check: Callable[[], Awaitable[Any]]) -> PersistenceError | None:
    try:
        await check()
    except PersistenceError as error:
        return error
    return None


def _reason(error: PersistenceError | None) -> str | None:
    """The code of an error of Redis, if it is one that says why no turn is possible."""
    found = _CODE.search(f"{type(error.__cause__).__name__} {error}") if error is not None else None
    return _CODES.get(found[0], found[0]) if found else None
