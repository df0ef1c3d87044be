"""The processes of a run: Redis and Postgres of its own, pods and workers behind links that can be troubled."""

import asyncio
import json
import signal
import subprocess
from contextlib import AsyncExitStack, suppress
from pathlib import Path
from random import Random
from time import monotonic
from types import TracebackType
from typing import Any, Self

import asyncpg
import httpx

from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PostgresServer
from tests.chaos.options import Options
from tests.chaos.store import AWAY, Store
from tests.support.links import Link
from tests.support.serving import ADMIN, NO_TLS, ROOT, GatewayProcess, wait_for

GRAPHS = Path(__file__).parent / "graphs" / "langgraph.json"
AGENTS: dict[str, int] = {"usual": 1800, "brief": 1}
"""The agents by name, and how long their sessions stay in Redis after their last turn, in seconds."""
SITE_KEY = "the key with which the site of the chaos signs, long enough"
RATE_LIMIT = {"messages": 1000, "per_s": 60}
"""More than any visitor sends, so that only a wrong clock refuses one."""
STARTS_S = 20.0
"""How long a process may take to start, or to find that it cannot."""


class Site:
    """Everything that runs. `pods` and `workers` are processes; a pod that is not `up` gets no requests, as a balancer that
    looks at /readyz would have it."""

    def __init__(self, options: Options, directory: Path) -> None:
        self.options = options
        self.directory = directory
        chance = Random(f"links {options.seed}")
        self.eviction = options.eviction
        self.store = Store(options, directory)
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
        self._stack.callback(self.postgres.stop)
        starting = asyncio.create_task(asyncio.to_thread(self.postgres.start))
        try:
            await self._stack.enter_async_context(self.store)
        finally:
            await starting
        await self._migrate()
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

    async def _process(self, command: str, name: str) -> GatewayProcess:
        postgres_link = await self._stack.enter_async_context(Link(self.postgres.url, self._chance))
        self.postgres_links.append(postgres_link)
        redis_url = self.store.url
        # Sentinels and nodes name each other to clients: no link can stand before them.
        if self.options.topology == "single":
            redis_link = await self._stack.enter_async_context(Link(redis_url, self._chance, wanted=b"secret-"))
            self.redis_links.append(redis_link)
            redis_url = redis_link.url
        environment = {
            "GATEWAY_REDIS_URL": redis_url,
            "GATEWAY_DATABASE_URL": postgres_link.url,
            "GATEWAY_GRAPHS": str(GRAPHS),
            "GATEWAY_LEASE_S": str(self.options.lease_s),
            "GATEWAY_ADDRESS_RATE_LIMIT": "off",
            "GATEWAY_ADDRESS_SESSION_LIMIT": "off",
            "GATEWAY_WORKER_NAME": name,
        }
        if self.options.replicas:
            environment["GATEWAY_REDIS_REPLICAS"] = str(self.options.replicas)
        process = GatewayProcess(command, self.directory, environment, source=self._source)
        self._stack.callback(self._end, process)
        return process

    def _end(self, process: GatewayProcess) -> None:
        if process.started:
            process.kill()

    async def put_agent(self, name: str, hot_ttl_s: int) -> None:
        """Makes an agent, or changes how long its sessions stay in Redis; asks until it is done, for a store may be away."""
        body = {
            "graph": "recall",
            "rate_limit": RATE_LIMIT,
            "hot_ttl_s": hot_ttl_s,
            "if_busy": "queue",
            "site_keys": [SITE_KEY],
        }

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

    async def row_id(self, session_id: str) -> str:
        """The id of a session's row, of whichever store has it; empty when that cannot be told now."""
        with suppress(*AWAY):
            found: Any = await self.store.client.hget(self.store.keys.session(session_id), "id")
            if found:
                return str(found.decode())
        with suppress(asyncpg.PostgresError, OSError):
            connection = await asyncpg.connect(self.postgres.url, timeout=5)
            try:
                query = "SELECT id::text FROM agent_sessions WHERE session_id = $1"
                return str(await connection.fetchval(query, session_id, timeout=5) or "")
            finally:
                await connection.close(timeout=5)
        return ""

    def logged(self, event: str) -> int:
        """How often the workers and pods have logged an event."""
        count = 0
        for process in (*self.pods, *self.workers):
            for line in process.output().splitlines():
                if line.startswith("{") and json.loads(line).get("event") == event:
                    count += 1
        return count
