"""The composition root: builds every object of a pod and of a worker, and hands them to each other."""

import os
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import structlog
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.routing import BaseRoute

from gateway import __version__
from gateway.access.admin_key import AdminAccess, AdminKeys
from gateway.access.gatekeeper import Gatekeeper
from gateway.access.tokens import SessionTokens
from gateway.agents import Agents
from gateway.api.agents import AgentsApi
from gateway.api.answers import on_http_exception, on_persistence_error, on_problem, on_unexpected
from gateway.api.chat import ChatApi
from gateway.api.docs.openapi import openapi_document
from gateway.api.docs.routes import ReferenceApi
from gateway.api.endpoint import Endpoint
from gateway.api.entrance import Entrance
from gateway.api.middleware.client_address import ClientAddress
from gateway.api.middleware.cors import Cors
from gateway.api.middleware.headers import SafeHeaders
from gateway.api.ops import OpsApi
from gateway.api.reading import BodyBounds
from gateway.api.routes import endpoints, routes
from gateway.api.sessions import SessionsApi
from gateway.api.widget import WidgetApi
from gateway.graphs.graphs import Graphs
from gateway.graphs.loading import load_graphs
from gateway.limits.ledger import Ledger
from gateway.limits.limiter import Limiter
from gateway.limits.open_streams import OpenStreams
from gateway.limits.refusals import Refusals
from gateway.metrics import Metrics
from gateway.problems import Problem
from gateway.settings import Settings
from gateway.streams.streams import Streams
from gateway.turns.in_process import AgentRuntime
from gateway.turns.turns import Turns
from persistence.errors import PersistenceError, PostgresUnavailable, RedisUnavailable
from persistence.history import History
from persistence.housekeeping import Housekeeping
from persistence.hydrator import Hydrator
from persistence.model.agents import RateLimit
from persistence.postgres.migrate import load_migrations
from persistence.postgres.postgres import Postgres
from persistence.redis.agent_copies import AgentCopies
from persistence.redis.connection import Client, connect, connect_to
from persistence.redis.epochs import Epochs, Fences
from persistence.redis.keys import Keys
from persistence.redis.outbox import Outbox
from persistence.redis.partitions import Partitions
from persistence.redis.probe import Probe
from persistence.redis.scripts import Scripts
from persistence.redis.server_check import check_server
from persistence.redis.sessions import SessionStore
from persistence.redis.shared_limits import SharedLimits
from persistence.redis.turn_logs import TurnLogs
from persistence.redis.wakeups import WakeUps
from persistence.rescue import Rescue, Wait
from persistence.settler import Settler
from persistence.supervisor import Supervisor
from persistence.sweep import Sweep
from persistence.watch import Watch
from persistence.worker import Worker

log = structlog.get_logger()


class Stores:
    """Redis, Postgres and the objects directly above them: pods, workers and commands share this part."""

    def __init__(self, settings: Settings, *, of_worker: bool = False) -> None:
        self.keys = Keys(settings.key_prefix, settings.partition_count)
        self.client: Client = connect(settings.redis_url)
        self.postgres = Postgres(settings.database_url, connections=settings.database_connections)
        self._replicas = settings.redis_replicas
        fences = Fences()
        name = settings.worker_name or f"{socket.gethostname()}-{os.getpid()}"
        connect_one = partial(connect_to, settings.redis_url)
        leave = (
            Rescue(connect_one, self.keys, self.postgres, name).leave if of_worker else Wait(connect_one, self.keys).leave
        )
        self.epochs = Epochs(self.keys, fences)
        self.settler = Settler(self.epochs, self.postgres)
        self.scripts = Scripts(self.client, settle=self.settler.settle, leave=leave, replicas=settings.redis_replicas)
        self.watch = Watch(self.scripts, self.settler, of_worker=False)
        self.sessions = SessionStore(
            self.scripts,
            self.keys,
            lease_ms=int(settings.lease_s * 1000),
            max_backlog=settings.max_backlog,
            max_backlog_bytes=settings.max_backlog_bytes,
            fences=fences,
        )
        self.turn_logs = TurnLogs(self.scripts, self.keys)
        self.agent_copies = AgentCopies(self.scripts, self.keys)
        self.agents = Agents(self.agent_copies, self.postgres)
        self.hydrator = Hydrator(self.sessions, self.postgres, self.agents)
        self.partitions = Partitions(self.scripts, self.keys)
        self.outbox = Outbox(self.scripts, self.keys, name, self.partitions)

    async def check(self) -> None:
        """Refuses a Redis whose configuration would break the guarantees. Raises PersistenceError."""
        await check_server(self.client, self.keys, replicas=self._replicas)

    async def copy_agents(self) -> None:
        """Copies all agents to Redis; logs a warning while Postgres is down or Redis is full."""
        try:
            for agent in await self.agents.list():
                await self.agent_copies.put(agent)
        except (PostgresUnavailable, RedisUnavailable) as error:
            log.warning("agents.not_copied", error=str(error))

    async def close(self) -> None:
        self.watch.close()
        await self.postgres.close()
        await self.client.aclose()


class Pod:
    """One pod: the ASGI application, and the parts that the server and tests reach into."""

    def __init__(self, settings: Settings, stores: Stores, graphs: Graphs, extra_routes: Sequence[BaseRoute] = ()) -> None:
        self.settings = settings
        self.stores = stores
        self.metrics = Metrics()
        self.history = History(
            stores.scripts,
            stores.keys,
            stores.sessions,
            stores.turn_logs,
            stores.postgres,
            stores.hydrator,
            stores.outbox,
            stores.partitions,
        )
        self.wakeups = WakeUps(stores.client, stores.keys)
        self.streams = Streams(self.history, stores.sessions, stores.turn_logs, self.wakeups, stores.keys)
        self.turns = Turns(
            stores.sessions,
            stores.turn_logs,
            self.streams,
            stores.hydrator,
            graphs.run,
            self.metrics,
            queue_wait_s=settings.queue_wait_s,
        )
        self.runtime = AgentRuntime(stores.agents, self.turns)
        self.ledger = Ledger(SharedLimits(stores.scripts, stores.keys))
        refusals = Refusals(self.metrics, settings.limit_mode)
        self.limiter = Limiter(
            self.ledger,
            refusals,
            address=RateLimit(*settings.address_limit) if settings.address_limit else None,
            sessions=RateLimit(*settings.session_limit) if settings.session_limit else None,
            refuse_on_failure=settings.limit_failure == "refuse",
        )
        self.open_streams = OpenStreams(
            refusals, per_session=settings.max_streams_per_session, per_address=settings.max_streams_per_address
        )
        self.draining = False
        self.supervisor = Supervisor()
        self.app = self._build(graphs, extra_routes)

    def _build(self, graphs: Graphs, extra_routes: Sequence[BaseRoute]) -> Starlette:
        settings, stores = self.settings, self.stores
        keys = [key for key in (settings.secret_key, settings.secret_key_previous) if key]
        tokens = SessionTokens(keys, settings.token_ttl_s)
        admin_keys = AdminKeys(settings.admin_key, settings.admin_key_previous)
        gatekeeper = Gatekeeper(tokens, AdminAccess(admin_keys, plaintext=settings.admin_plaintext))
        bounds = BodyBounds(settings.max_body_bytes, settings.body_timeout_s, settings.max_metadata_bytes)
        entrance = Entrance(stores.agents, self.history, gatekeeper, self.limiter)
        table: list[Endpoint] = []
        table += endpoints(
            ChatApi(
                entrance,
                self.runtime,
                self.streams,
                self.history,
                stores.turn_logs,
                gatekeeper,
                self.limiter,
                self.open_streams,
                bounds=bounds,
                max_message_chars=settings.max_message_chars,
            ),
            SessionsApi(
                entrance,
                stores.agents,
                stores.sessions,
                stores.hydrator,
                self.history,
                self.streams,
                gatekeeper,
                tokens,
                self.limiter,
                self.open_streams,
                bounds=bounds,
            ),
            AgentsApi(stores.agents, graphs, gatekeeper, bounds=bounds),
            OpsApi(
                Probe(stores.scripts, stores.keys).check,
                stores.postgres.migrated_to,
                lambda: self.draining,
                lambda: self.supervisor.down,
                stores.outbox,
                stores.epochs,
                stores.partitions,
                stores.scripts,
                self.metrics,
            ),
            WidgetApi(),
            # The reference describes the whole table, its own calls included.
            ReferenceApi(lambda: openapi_document(table, __version__)),
        )
        return Starlette(
            routes=[*routes(table), *extra_routes],
            middleware=[
                Middleware(ClientAddress, trusted=settings.trusted_networks),
                Middleware(SafeHeaders),
                Middleware(Cors, agents=stores.agents, gatekeeper=gatekeeper),
            ],
            exception_handlers={
                Problem: on_problem,
                PersistenceError: on_persistence_error,
                HTTPException: on_http_exception,
                Exception: on_unexpected,
            },
            lifespan=self._lifespan,
        )

    @asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        self.supervisor.start("wakeups", partial(self.wakeups.run, self.turns.cancel))
        self.supervisor.start("limits", self.limiter.run)
        self.supervisor.start("watch", self.stores.watch.run)
        await self.stores.copy_agents()
        log.info("pod.started", partitions=self.stores.keys.partitions)
        yield
        await self.drain()
        await self.supervisor.stop()
        log.info("pod.stopped")

    def announce_drain(self) -> None:
        """Makes /readyz fail; the pod serves as usual."""
        if not self.draining:
            log.info("pod.draining")
        self.draining = True

    def begin_drain(self) -> None:
        """Announces the drain and ends the streams that would never end by themselves."""
        self.announce_drain()
        self.streams.close()

    async def drain(self) -> None:
        """Begins to drain and waits for the running turns, for `drain_s` at most."""
        self.begin_drain()
        await self.turns.drain(self.settings.drain_s)


async def build_pod(settings: Settings, stores: Stores, extra_routes: Sequence[BaseRoute] = ()) -> Pod:
    """A pod whose graphs are loaded and whose Redis is checked. Raises PersistenceError or GraphError."""
    base_urls = [url.strip() for url in settings.model_base_urls.split(",") if url.strip()]
    graphs = await load_graphs(Path(settings.graphs).absolute() if settings.graphs else None, base_urls)
    await stores.check()
    return Pod(settings, stores, graphs, extra_routes)


async def build_worker(settings: Settings, stores: Stores) -> Worker:
    """A worker whose Redis is checked. Raises PersistenceError."""
    await stores.check()
    housekeeping = Housekeeping(
        stores.scripts,
        stores.keys,
        stores.sessions,
        stores.postgres,
        stores.agents,
        stores.partitions,
        session_timeout_s=settings.session_timeout_s,
    )
    watch = Watch(stores.scripts, stores.settler, of_worker=True)
    sweep = Sweep(stores.scripts, stores.keys, stores.sessions, stores.postgres, stores.hydrator, stores.partitions)
    return Worker(stores.outbox, stores.postgres, stores.sessions, housekeeping, watch, sweep)


async def warn_if_not_migrated(postgres: Postgres) -> None:
    """Logs a warning when the database lacks migrations: the worker waits for them, chat goes on."""
    expected = len(load_migrations())
    try:
        found = await postgres.migrated_to()
    except PostgresUnavailable as error:
        log.warning("postgres.unavailable", error=str(error))
        return
    if found != expected:
        log.warning("postgres.not_migrated", found=found, expected=expected, remedy="python -m gateway migrate")
