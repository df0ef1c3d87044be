"""Something that nobody foresees happens in each long-lived task of pod and worker: it is seen, said, and goes on."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from structlog.testing import capture_logs

from gateway.app import Pod, Stores, build_pod, build_worker
from gateway.limits.limiter import Limiter
from gateway.settings import Settings
from persistence.redis.wakeups import WakeUps
from persistence.supervisor import Supervisor
from persistence.watch import Watch
from persistence.worker import Worker
from tests.support.serving import served, wait_for

POD_TASKS: dict[str, tuple[type, str]] = {
    "limits": (Limiter, "sync"),
    "wakeups": (WakeUps, "run"),
    "watch": (Watch, "look_next"),
}
WORKER_TASKS: dict[str, str] = {
    "flush": "_flush_all",
    "housekeeping": "_housekeep",
    "sweep": "_sweep_once",
    "watch": "_look_next",
}


class Trouble:
    """A method that raises a KeyError while it is `on`, and counts the rounds that it let through."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        self.on = False
        self.rounds = 0
        usual = getattr(owner, name)

        async def troubled(itself: Any, *arguments: Any) -> Any:
            if self.on:
                raise KeyError("nobody foresaw this")
            self.rounds += 1
            return await usual(itself, *arguments)

        monkeypatch.setattr(owner, name, troubled)


async def readiness(client: httpx.AsyncClient) -> tuple[int, list[str]]:
    answer = await client.get("/readyz")
    return answer.status_code, answer.json().get("tasks", [])


@pytest.fixture
async def pod(settings: Settings, stores: Stores, monkeypatch: pytest.MonkeyPatch) -> Pod:
    monkeypatch.setattr("persistence.supervisor.STEADY_S", 0.5)
    return await build_pod(settings, stores)


async def test_every_task_of_a_pod_is_tried(pod: Pod) -> None:
    async with served(pod):
        assert sorted(task.get_name() for task in pod.supervisor._tasks) == sorted(POD_TASKS)


@pytest.mark.parametrize("name", POD_TASKS)
async def test_a_task_of_a_pod_that_fails_is_seen_and_goes_on(pod: Pod, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    owner, method = POD_TASKS[name]
    trouble = Trouble(monkeypatch, owner, method)
    trouble.on = name == "wakeups"  # its one round lasts for ever
    with capture_logs() as logs:
        async with served(pod) as client:
            trouble.on = True

            async def is_down() -> bool:
                return await readiness(client) == (503, [name])

            await wait_for(is_down, "the pod is not ready, and says why")
            rounds, trouble.on = trouble.rounds, False

            async def is_up() -> bool:
                return await readiness(client) == (200, []) and trouble.rounds > rounds

            await wait_for(is_up, "the task goes on")
    said = [line for line in logs if line["event"] == "task.failed"]
    assert {line["task"] for line in said} == {name}
    assert all("KeyError" in line["error"] for line in said)
    assert all(line["exc_info"] for line in said), "with its place"


async def test_control_without_the_supervisor_it_ends_in_silence(pod: Pod, monkeypatch: pytest.MonkeyPatch) -> None:
    async def keep(supervisor: Supervisor, name: str, run: Callable[[], Awaitable[None]]) -> None:
        await run()

    monkeypatch.setattr(Supervisor, "keep", keep)
    trouble = Trouble(monkeypatch, Limiter, "sync")
    with capture_logs() as logs:
        async with served(pod) as client:
            trouble.on = True
            (task,) = [task for task in pod.supervisor._tasks if task.get_name() == "limits"]
            await wait_for(task.done, "it has ended")
            assert await readiness(client) == (200, [])
    assert not [line for line in logs if line["event"] == "task.failed"]


@pytest.mark.parametrize("name", WORKER_TASKS)
async def test_a_loop_of_a_worker_that_fails_is_seen_and_goes_on(
    settings: Settings, stores: Stores, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("persistence.worker.MAX_BACKOFF_S", 0.05)
    monkeypatch.setattr("persistence.worker.SWEEP_EVERY_S", 0.05)
    trouble = Trouble(monkeypatch, Worker, WORKER_TASKS[name])
    trouble.on = True
    worker = await build_worker(settings, stores)
    with capture_logs() as logs:
        working = asyncio.create_task(worker.run())

        def is_said() -> bool:
            return any(line["event"] == "worker.not_healthy" and line["task"] == name for line in logs)

        await wait_for(is_said, "the worker says that it is not healthy")
        trouble.on = False
        await wait_for(lambda: trouble.rounds > 1, "the loop goes on")
        assert not working.done()
        worker.stop()
        await working
