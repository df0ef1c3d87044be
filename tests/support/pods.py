"""Pods whose graph waits for the test, and gateway processes that end with it."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import msgspec
import structlog
from langgraph.graph import StateGraph

from gateway.app import Pod, Stores
from gateway.graphs.echo import EchoState, echo_graph
from gateway.graphs.graphs import Graphs
from gateway.settings import Settings
from persistence.redis.scripts import Scripts
from tests.support.serving import GatewayProcess, served, wait_for


@contextmanager
def plain_logs() -> Iterator[None]:
    """Logs of one line each: structlog's own default draws a traceback with all its variables, which takes seconds."""
    structlog.configure(processors=[structlog.processors.add_log_level, structlog.processors.KeyValueRenderer()])
    yield
    structlog.reset_defaults()


class Gated:
    """The graph `gated`: a turn says that it has started, and waits until the test lets its message go."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.cancelled: list[str] = []
        self.failing: set[str] = set()
        self.failing_when_cancelled: set[str] = set()
        self._gates: defaultdict[str, asyncio.Event] = defaultdict(asyncio.Event)
        self._open = False

    def let_go(self, *messages: str) -> None:
        """Lets the turns of these messages end, running or yet to come."""
        for message in messages:
            self._gates[message].set()

    def open(self) -> None:
        """Lets every turn end."""
        self._open = True
        self.let_go(*self._gates)

    async def has_started(self, message: str, times: int = 1) -> None:
        """Waits until the graph runs on a message."""
        await wait_for(lambda: self.started.count(message) >= times, f"the turn of {message!r} starts")

    async def _answer(self, state: EchoState) -> EchoState:
        message = state["user_input"]
        self.started.append(message)
        try:
            if not self._open:
                await self._gates[message].wait()
        except asyncio.CancelledError:
            self.cancelled.append(message)
            if message in self.failing_when_cancelled:
                raise ConnectionError("the call of the model was cut") from None
            raise
        if message in self.failing:
            raise RuntimeError("told to fail")
        return {"agent_response": f"Answer to {message}", "metadata": {"history": len(state["messages"]) - 1}}

    def graphs(self) -> Graphs:
        """The graphs of a pod: this one and `echo`."""
        graph = StateGraph(EchoState)
        graph.add_node("answer", self._answer)
        graph.set_entry_point("answer")
        return Graphs({"gated": graph.compile(), "echo": echo_graph()})


class ServedPod:
    """A pod with stores and a gated graph of its own, and an HTTP client of it."""

    def __init__(self, pod: Pod, client: httpx.AsyncClient, gated: Gated) -> None:
        self.pod = pod
        self.stores = pod.stores
        self.client = client
        self.gated = gated
        self._begin, self._begins = pod.stores.sessions.begin, 0
        pod.stores.sessions.begin = self._counted_begin  # type: ignore[method-assign]

    async def _counted_begin(self, *arguments: Any, **named: Any) -> Any:
        found = await self._begin(*arguments, **named)
        self._begins += 1
        return found

    async def has_asked(self) -> None:
        """Waits until a turn on this pod has asked for its session."""
        await wait_for(lambda: self._begins > 0, "the pod asks for the session")

    def send(self, message: str, session_id: str, **fields: Any) -> "asyncio.Task[httpx.Response]":
        """Sends a message to the agent `shop` and does not wait for the answer."""
        return asyncio.create_task(self.ask(message, session_id, **fields))

    async def ask(self, message: str, session_id: str, **fields: Any) -> httpx.Response:
        """Sends a message to the agent `shop`."""
        body = {"message": message, "session_id": session_id, **fields}
        return await self.client.post("/api/chat/shop/message", json=body)

    async def transcript(self, session_id: str) -> list[str]:
        """The contents of the session's messages."""
        answer = await self.client.get(f"/api/sessions/{session_id}/messages")
        assert answer.status_code == 200, answer.text
        return [message["content"] for message in answer.json()["messages"]]


@asynccontextmanager
async def gated_pod(settings: Settings, **changes: Any) -> AsyncIterator[ServedPod]:
    """A served pod on the stores of the settings, with `changes` to them. No turn of it outlives the test."""
    settings = msgspec.structs.replace(settings, **changes)
    stores, gated = Stores(settings), Gated()
    async with AsyncExitStack() as stack:
        stack.push_async_callback(stores.close)
        pod = Pod(settings, stores, gated.graphs())
        client = await stack.enter_async_context(served(pod))
        stack.callback(gated.open)
        yield ServedPod(pod, client, gated)


def environment_of(settings: Settings) -> dict[str, str]:
    """The variables with which a process works on the same stores."""
    return {
        "GATEWAY_REDIS_URL": settings.redis_url,
        "GATEWAY_DATABASE_URL": settings.database_url,
        "GATEWAY_ADDRESS_RATE_LIMIT": "off",
        "GATEWAY_ADDRESS_SESSION_LIMIT": "off",
    }


@asynccontextmanager
async def gateway_process(
    command: str, settings: Settings, directory: Path, **environment: str
) -> AsyncIterator[GatewayProcess]:
    """A gateway process that has started, on the stores of the settings; killed at the end if it still runs."""
    process = GatewayProcess(command, directory, environment_of(settings) | environment)
    try:
        yield await process.start()
    finally:
        process.kill()


def rewrite(scripts: Scripts, name: str, change: Callable[[str], str]) -> None:
    """Takes a guard out of a script, for these `scripts` alone: what controls are made of."""
    text = change(scripts.texts[name])
    assert text != scripts.texts[name], f"nothing was changed in {name}"
    scripts.use(name, text)


async def fields_of(stores: Stores, session_id: str) -> dict[str, str]:
    """The whole session hash, but for the rate limit: a turn that failed is charged too."""
    fields: dict[bytes, bytes] = await stores.client.execute_command("HGETALL", stores.keys.session(session_id))
    return {name.decode(): value.decode() for name, value in fields.items() if name != b"rate_tat_ms"}
