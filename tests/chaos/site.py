"""The processes of a run: Redis and Postgres of its own, pods and workers behind links that can be troubled."""

import asyncio
import json
import signal
import subprocess
from collections.abc import Awaitable
from contextlib import AsyncExitStack
from pathlib import Path
from random import Random
from time import monotonic
from types import TracebackType
from typing import Any, Self

import httpx
from redis.asyncio import Redis
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import RedisError, ResponseError

from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer
from persistence.redis.keys import GROUP, Keys
from tests.chaos.options import Options
from tests.support.links import Link
from tests.support.serving import ADMIN, NO_TLS, ROOT, GatewayProcess, wait_for

GRAPHS = Path(__file__).parent / "graphs" / "langgraph.json"
AGENTS: dict[str, int] = {"usual": 1800, "brief": 1}
"""The agents by name, and how long their sessions stay in Redis after their last turn, in seconds."""
STALL_MS = "250"
"""From which time on Redis notes what held it up, in milliseconds."""
STARTS_S = 20.0
"""How long a process may take to start, or to find that it cannot."""


class Site:
    """Everything that runs. `pods` and `workers` are processes; a pod that is not `up` gets no requests, as a balancer that
    looks at /readyz would have it."""

    def __init__(self, options: Options, directory: Path) -> None:
        self.options = options
        self.directory = directory
        self.keys = Keys("gw", 1)
        chance = Random(f"links {options.seed}")
        self.eviction = options.eviction
        config = {
            "appendfsync": options.appendfsync,
            "maxmemory-policy": options.eviction,
            "latency-monitor-threshold": STALL_MS,
        }
        self.redis = RedisServer(directory / "redis", free_port(), config=config)
        self.postgres = PostgresServer(directory / "postgres", free_port(), database="gateway")
        self.redis_links: list[Link] = []
        self.postgres_links: list[Link] = []
        self.pods: list[GatewayProcess] = []
        self.workers: list[GatewayProcess] = []
        self.up: list[bool] = []
        self.restarts = 0
        self.deaths: list[str] = []
        self._wanted: set[GatewayProcess] = set()
        self._spawned_at: dict[GatewayProcess, float] = {}
        self._chance = chance
        self._source = options.source or ROOT
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        try:
            await self._start()
        except BaseException:
            await self._stack.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._stack.aclose()

    async def _start(self) -> None:
        for server in (self.redis, self.postgres):
            self._stack.callback(server.stop)
        await asyncio.gather(*(asyncio.to_thread(server.start) for server in (self.redis, self.postgres)))
        await self._migrate()
        self.client = self._redis_client()
        self._stack.push_async_callback(self.client.aclose)
        self.http = httpx.AsyncClient(timeout=5, verify=NO_TLS)
        self._stack.push_async_callback(self.http.aclose)
        for index in range(self.options.pods):
            self.pods.append(await self._process("serve", f"pod-{index + 1}"))
        for index in range(self.options.workers):
            self.workers.append(await self._process("worker", f"worker-{index + 1}"))
        self.up = [False] * len(self.pods)
        self._wanted = {*self.pods, *self.workers}
        for process in self._wanted:
            self._spawn(process)
        for task in (asyncio.create_task(self._watch()), asyncio.create_task(self._supervise())):
            self._stack.callback(task.cancel)
        await wait_for(lambda: all(self.up), "every pod is ready", 30)
        for name, hot_ttl_s in AGENTS.items():
            await self.put_agent(name, hot_ttl_s)

    async def _migrate(self) -> None:
        environment = {"GATEWAY_DATABASE_URL": self.postgres.url}
        migrating = GatewayProcess("migrate", self.directory, environment, source=self._source).spawn()
        status = await asyncio.to_thread(migrating.process.wait, 60)
        assert status == 0, migrating.output()

    def _redis_client(self) -> Redis:
        retry = Retry(NoBackoff(), 0)
        return Redis(port=self.redis.port, protocol=2, retry=retry, socket_timeout=5, health_check_interval=0)

    async def _process(self, command: str, name: str) -> GatewayProcess:
        redis_link = Link(self.redis.url, self._chance, wanted=b"secret-")
        postgres_link = Link(self.postgres.url, self._chance)
        for link, links in ((redis_link, self.redis_links), (postgres_link, self.postgres_links)):
            links.append(await self._stack.enter_async_context(link))
        environment = {
            "GATEWAY_REDIS_URL": redis_link.url,
            "GATEWAY_DATABASE_URL": postgres_link.url,
            "GATEWAY_GRAPHS": str(GRAPHS),
            "GATEWAY_LEASE_S": str(self.options.lease_s),
            "GATEWAY_ADDRESS_RATE_LIMIT": "off",
            "GATEWAY_ADDRESS_SESSION_LIMIT": "off",
            "GATEWAY_WORKER_NAME": name,
        }
        process = GatewayProcess(command, self.directory, environment, source=self._source)
        self._stack.callback(self._end, process)
        return process

    def _end(self, process: GatewayProcess) -> None:
        if process.started:
            process.kill()

    async def put_agent(self, name: str, hot_ttl_s: int) -> None:
        """Makes an agent, or changes how long its sessions stay in Redis; asks until it is done, for a store may be away."""
        body = {"graph": "recall", "rate_limit": None, "hot_ttl_s": hot_ttl_s, "if_busy": "queue"}

        async def put() -> bool:
            pod = self.pods[self.up.index(True) if any(self.up) else 0]
            try:
                answer = await self.http.put(f"{pod.url}/api/agents/{name}", json=body, headers=ADMIN)
            except httpx.HTTPError:
                return False
            assert answer.status_code in (200, 201, 503), answer.text
            return answer.is_success

        await wait_for(put, f"the agent {name} is stored", 180)

    async def _watch(self) -> None:
        """Looks at /readyz as a balancer does: twice a second, down after one that fails or takes over a second."""

        async def look(index: int, pod: GatewayProcess) -> None:
            while True:
                try:
                    async with asyncio.timeout(1):
                        self.up[index] = (await self.http.get(f"{pod.url}/readyz")).status_code == 200
                except (httpx.HTTPError, TimeoutError):
                    self.up[index] = False
                await asyncio.sleep(0.5)

        await asyncio.gather(*(look(index, pod) for index, pod in enumerate(self.pods)))

    async def _supervise(self) -> None:
        """Starts what is wanted and does not run, as an orchestrator does: a process may find its stores away and end. One
        that has worked has no reason to."""
        while True:
            for process in self._wanted:
                if process.started and process.process.poll() is not None:
                    self.restarts += 1
                    if monotonic() - self._spawned_at[process] > STARTS_S:
                        self.deaths.append(f"{process.log.stem} ended by itself with {process.process.returncode}")
                    self._spawn(process)
            await asyncio.sleep(0.5)

    def _spawn(self, process: GatewayProcess) -> None:
        self._spawned_at[process] = monotonic()
        process.spawn()

    def kill(self, process: GatewayProcess) -> None:
        """SIGKILL; it stays down until it is revived."""
        self._wanted.discard(process)
        process.kill()
        self._note_down(process)

    async def stop(self, process: GatewayProcess) -> int:
        """SIGTERM, after a minute SIGKILL; the exit status. It stays down until it is revived."""
        self._wanted.discard(process)
        process.signal(signal.SIGTERM)
        self._note_down(process)
        try:
            return await asyncio.to_thread(process.process.wait, 60)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.process.returncode

    def _note_down(self, process: GatewayProcess) -> None:
        if process in self.pods:
            self.up[self.pods.index(process)] = False

    async def revive(self, process: GatewayProcess) -> None:
        """Has the process run again; waits until a pod is ready."""
        self._spawn(process)
        self._wanted.add(process)
        if process in self.pods:
            index = self.pods.index(process)
            await wait_for(lambda: self.up[index], "the pod is ready again", 60)

    def choose(self, chance: Random) -> int:
        """A pod to send a request to."""
        ready = [index for index, up in enumerate(self.up) if up]
        return chance.choice(ready or range(len(self.pods)))

    async def healthy(self, limit_s: float = 60) -> None:
        """Waits until every pod is ready and Postgres answers."""

        async def postgres_answers() -> bool:
            answers = await asyncio.gather(
                *(self.http.get(f"{pod.url}/readyz") for pod in self.pods), return_exceptions=True
            )
            return all(isinstance(one, httpx.Response) and one.json()["postgres"] == "ok" for one in answers)

        await wait_for(lambda: all(self.up), "every pod is ready", limit_s)
        await wait_for(postgres_answers, "every pod sees Postgres", limit_s)

    async def waiting(self) -> tuple[int, int]:
        """Records on the outbox, and those of them that a worker has taken and not acknowledged."""
        outbox = self.keys.outbox(0)
        records = int(await self.client.xlen(outbox))
        pending = await of_group(self.client.xpending(outbox, GROUP))
        # Without its group nothing is pending; the stores tell what was lost.
        return records, int(pending["pending"]) if pending is not None else 0

    async def last_taken(self) -> str | None:
        """The id of the record that workers have taken last; None while Redis or the outbox's group is away."""
        try:
            groups = await self.client.xinfo_groups(self.keys.outbox(0))
        except (RedisError, OSError):
            return None
        return next((str(one["last-delivered-id"]) for one in groups if one["name"] == GROUP.encode()), None)

    def logged(self, event: str) -> int:
        """How often the workers and pods have logged an event."""
        count = 0
        for process in (*self.pods, *self.workers):
            for line in process.output().splitlines():
                if line.startswith("{") and json.loads(line).get("event") == event:
                    count += 1
        return count


async def of_group(reply: Awaitable[Any]) -> Any:
    """A reply about the outbox's group; None when the outbox, or its group, is gone: a Redis that may evict anything takes
    the outbox too."""
    try:
        return await reply
    except ResponseError as error:
        if not str(error).startswith("NOGROUP"):
            raise
        return None
