"""A graph that streams what the test says, and pods on it: nothing happens before the test wants it."""

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import httpx
import msgspec
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, AIMessageChunk, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langgraph.config import get_stream_writer
from langgraph.graph import StateGraph

from gateway.app import Pod, Stores
from gateway.graphs.echo import EchoState, echo_graph
from gateway.graphs.graphs import Graphs
from gateway.settings import Settings
from tests.support.serving import served, wait_for

Piece = str | dict[str, Any] | Exception | None
"""Text, a custom event, a failure, or the end."""


class SpokenModel(BaseChatModel):
    """A chat model that streams the pieces of a queue."""

    pieces: Any
    write: Any

    @property
    def _llm_type(self) -> str:
        return "spoken"

    async def _spoken(self) -> AsyncIterator[str]:
        while (piece := await self.pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            if isinstance(piece, dict):
                self.write(piece)
            else:
                yield piece

    def _generate(self, messages: list[BaseMessage], *arguments: Any, **options: Any) -> ChatResult:
        raise NotImplementedError

    async def _agenerate(self, messages: list[BaseMessage], *arguments: Any, **options: Any) -> ChatResult:
        text = "".join([piece async for piece in self._spoken()])
        return ChatResult(generations=[ChatGeneration(message=AIMessage(text))])

    async def _astream(
        self, messages: list[BaseMessage], *arguments: Any, **options: Any
    ) -> AsyncIterator[ChatGenerationChunk]:
        async for piece in self._spoken():
            yield ChatGenerationChunk(message=AIMessageChunk(content=piece))
        # A model that says nothing at all is an error to LangChain.
        yield ChatGenerationChunk(message=AIMessageChunk(content=""))


class Spoken:
    """The graph `spoken`. Turns are named by their message; any pod of the test may run them."""

    def __init__(self) -> None:
        self.started: list[str] = []
        self.cancelled: list[str] = []
        self._pieces: defaultdict[str, asyncio.Queue[Piece]] = defaultdict(asyncio.Queue)
        self._over = False
        self._running = 0

    def say(self, message: str, *pieces: Piece) -> None:
        """Lets the turn of a message stream these pieces."""
        for piece in pieces:
            self._pieces[message].put_nowait(piece)

    def end(self, *messages: str) -> None:
        """Lets turns end, running or yet to come."""
        for message in messages:
            self.say(message, None)

    def give_up(self) -> None:
        """Ends every turn, so that pods can stop."""
        self._over = True
        self.end(*self._pieces)

    async def begin_anew(self) -> None:
        """Ends every turn, waits for their ends, and forgets all of them."""
        self.give_up()
        await wait_for(lambda: self._running == 0, "the turns end")
        self._over = False
        for what in (self.started, self.cancelled, self._pieces):
            what.clear()

    async def has_started(self, message: str, times: int = 1) -> None:
        await wait_for(lambda: self.started.count(message) >= times, f"the turn of {message!r} starts")

    async def _answer(self, state: EchoState) -> EchoState:
        message = state["user_input"]
        self.started.append(message)
        self._running += 1
        pieces = self._pieces[message]
        if self._over:
            pieces.put_nowait(None)
        try:
            answer = await SpokenModel(pieces=pieces, write=get_stream_writer()).ainvoke(state["messages"])
        except asyncio.CancelledError:
            self.cancelled.append(message)
            raise
        finally:
            self._running -= 1
        text = str(answer.text)
        return {"agent_response": text or f"Answer to {message}", "metadata": {"history": len(state["messages"]) - 1}}

    def graphs(self) -> Graphs:
        """The graphs of a pod: this one and `echo`."""
        graph = StateGraph(EchoState)
        graph.add_node("answer", self._answer)
        graph.set_entry_point("answer")
        return Graphs({"spoken": graph.compile(), "echo": echo_graph()})


class SpokenPod:
    """A served pod with stores of its own."""

    def __init__(self, pod: Pod, client: httpx.AsyncClient, spoken: Spoken) -> None:
        self.pod = pod
        self.spoken = spoken
        self.stores = pod.stores
        self.client = client

    async def ask(self, message: str, session_id: str, **fields: Any) -> httpx.Response:
        """POST …/message to the agent `shop`."""
        body = {"message": message, "session_id": session_id, **fields}
        return await self.client.post("/api/chat/shop/message", json=body)

    def send(self, message: str, session_id: str, **fields: Any) -> "asyncio.Task[httpx.Response]":
        """The same without waiting for the answer."""
        return asyncio.create_task(self.ask(message, session_id, **fields))

    async def cancel(self, session_id: str) -> httpx.Response:
        return await self.client.post("/api/chat/shop/cancel", json={"session_id": session_id})

    async def transcript(self, session_id: str) -> list[str]:
        """The contents of the session's messages."""
        answer = await self.client.get(f"/api/sessions/{session_id}/messages")
        assert answer.status_code == 200, answer.text
        return [message["content"] for message in answer.json()["messages"]]

    def tune(self, **changes: Any) -> None:
        """Changes times and bounds of the streams and logs that are opened here from now on."""
        self.pod.streams.options = msgspec.structs.replace(self.pod.streams.options, **changes)

    @property
    def wakeups(self) -> set[str]:
        """The channels that somebody here listens to, the pod's own apart."""
        return self.pod.wakeups.channels - {self.stores.keys.control}


@asynccontextmanager
async def spoken_pod(settings: Settings, spoken: Spoken, **changes: Any) -> AsyncIterator[SpokenPod]:
    """A served pod on the stores of the settings, with `changes` to them. No turn of it outlives the test."""
    settings = msgspec.structs.replace(settings, **changes)
    stores = Stores(settings)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(stores.close)
        pod = Pod(settings, stores, spoken.graphs())
        client = await stack.enter_async_context(served(pod))
        stack.callback(pod.begin_drain)
        stack.callback(spoken.give_up)
        await wait_for(lambda: pod.wakeups.listening, "the pod listens")
        yield SpokenPod(pod, client, spoken)


async def stored_events(stores: Stores, session_id: str, turn_id: str, last: int) -> None:
    """Waits until the log of a turn in Redis has come to event number `last`."""

    async def stored() -> bool:
        key = stores.keys.events(session_id, turn_id)
        entries = await stores.client.execute_command("XREVRANGE", key, "+", "-", "COUNT", 1)
        return bool(entries) and int(entries[0][0].split(b"-")[1]) >= last

    await wait_for(stored, f"event {last} is in Redis")


_numbers = iter(range(1, 1_000_000))


def new_session_id() -> str:
    """An id as a browser makes one up, another one at every call."""
    return f"session_{1_700_000_000_000 + next(_numbers)}_abc123xyz"
