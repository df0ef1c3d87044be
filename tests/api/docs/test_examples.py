"""Every example of the reference is true: what its curl line says is sent to a real pod, and the answer is the one shown."""

import asyncio
import json
import re
import shlex
from collections.abc import AsyncIterator, Mapping
from string import Template
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx
import msgspec
import pytest
from langgraph.config import get_stream_writer
from langgraph.graph import StateGraph

from gateway.api.docs.example import BASE, Example, is_stream
from gateway.api.docs.examples import STORY
from gateway.api.docs.sample_data import TOKEN, VERSION
from gateway.app import Pod, Stores
from gateway.graphs.echo import EchoState, echo_graph
from gateway.graphs.graphs import Graphs
from gateway.settings import Settings
from gateway.streams.events import KINDS, Custom, TurnFailed
from tests.conftest import PutAgent
from tests.support.serving import ADMIN_KEY, served, wait_for
from tests.support.sse import Event, open_stream, resume, speak
from tests.support.visiting import new_session_id

VARYING = {
    "id", "agent_id", "session_id", "turn_id", "session_token", "request_id", "started_at", "last_activity_at", "ended_at",
    "created_at", "latency_ms", "user_agent", "etag",
}  # fmt: skip
"""What differs from run to run: compared by type, and the same wherever the examples have the same."""
REPEATED = {"agent_id", "session_id", "turn_id", "started_at"}


class Request(NamedTuple):
    """What a curl line sends."""

    method: str
    url: str
    headers: dict[str, str]
    body: Any


def parsed(line: str, variables: Mapping[str, str]) -> Request:
    """Reads a curl line as a shell and curl do."""
    words = iter(shlex.split(Template(line.replace("\\\n", " ")).substitute(variables)))
    assert next(words) == "curl"
    method, url, body = "GET", "", None
    headers: dict[str, str] = {}
    for word in words:
        match word:
            case "-X":
                method = next(words)
            case "-H":
                name, _, value = next(words).partition(": ")
                headers[name] = value
            case "-d":
                body = json.loads(next(words))
            case "-N":
                continue
            case _:
                assert not url, line
                url = word
    assert url.startswith(BASE), line
    return Request(method, url.removeprefix(BASE), headers, body)


class Player:
    """Sends the examples in their order. `real` has what a run gave in place of the made-up ids, tokens and times."""

    def __init__(self, client: httpx.AsyncClient, document: dict[str, Any]) -> None:
        self._client = client
        self._document = document
        self.real: dict[str, str] = {}

    def request(self, example: Example) -> Request:
        """What the document says of an example, with the real ids."""
        sample = self._sample(example)
        keys = {"ADMIN_KEY": ADMIN_KEY, "SESSION_TOKEN": TOKEN}
        line = sample["source"]
        request = parsed(line, keys)
        return Request(*msgspec.json.decode(self._with_real(msgspec.json.encode(request).decode())))

    def _sample(self, example: Example) -> dict[str, Any]:
        method, _, path = example.call.partition(" ")
        samples = self._document["paths"][path][method.lower()]["x-codeSamples"]
        (sample,) = [sample for sample in samples if sample["label"] == example.summary]
        found: dict[str, Any] = sample
        assert found["x-status"] == example.status
        return found

    def _with_real(self, text: str) -> str:
        for made_up, real in self.real.items():
            text = text.replace(json.dumps(made_up)[1:-1], json.dumps(real)[1:-1])
        return text

    async def play(self, example: Example) -> None:
        """Sends an example and compares its answer."""
        request = self.request(example)
        if is_stream(example.answer):
            await self._play_stream(example, request)
            return
        answer = await self._client.request(request.method, request.url, json=request.body, headers=request.headers)
        self.check(example, answer)

    async def _play_stream(self, example: Example, request: Request) -> None:
        split = urlsplit(request.url)
        parameters = dict(httpx.QueryParams(split.query))
        sent = {"body": request.body, "headers": request.headers, **parameters}
        async with open_stream(self._client, request.method, split.path, **sent) as stream:
            events = await stream.take(len(example.answer))
        assert [(event.id, event.kind) for event in events] == [(event.id, event.event) for event in example.answer]
        for event, shown in zip(events, example.answer, strict=True):
            self._compare(shown.data, event.data, f"{example.call}: {event.kind}")

    def check(self, example: Example, answer: httpx.Response) -> None:
        """Compares an answer with the example's: status, media type, headers, and every field."""
        where = f"{example.call}, {example.summary}"
        assert answer.status_code == example.status, f"{where}: {answer.text}"
        self._compare(
            {name.lower(): value for name, value in example.answer_headers.items()},
            {name.lower(): answer.headers[name] for name in example.answer_headers},
            where,
        )
        if example.answer is None:
            assert answer.content == b"", where
        elif isinstance(example.answer, str):
            for line in self._with_real(example.answer).splitlines():
                assert line in answer.text, where
        elif example.call == "GET /openapi.json":
            assert example.answer.items() <= answer.json().items()
        else:
            self._compare(example.answer, answer.json(), where)

    def _compare(self, shown: Any, real: Any, where: str, name: str = "") -> None:
        match shown:
            case dict():
                assert isinstance(real, dict), where
                assert shown.keys() == real.keys(), where
                for key in shown:
                    self._compare(shown[key], real[key], f"{where}: {key}", key)
            case list():
                assert isinstance(real, list), where
                assert len(shown) == len(real), where
                for one, other in zip(shown, real, strict=True):
                    self._compare(one, other, where, name)
            case _ if name in VARYING:
                assert type(shown) is type(real), where
                if isinstance(shown, str):
                    if name in REPEATED:
                        assert self.real.get(shown, real) == real, where
                    self.real[shown] = real
            case str():
                assert self._with_real(shown) == real, where
            case _:
                # JSON has one kind of number.
                assert (isinstance(shown, bool), shown) == (isinstance(real, bool), real), where


@pytest.fixture
async def document(client: httpx.AsyncClient) -> dict[str, Any]:
    found: dict[str, Any] = (await client.get("/openapi.json")).json()
    return found


@pytest.fixture
async def player(client: httpx.AsyncClient, document: dict[str, Any]) -> Player:
    player = Player(client, document)
    version = re.search(r"\./widget/(\w+)/", (await client.get("/widget.js")).text)
    assert version is not None
    player.real[VERSION] = version[1]
    return player


async def test_every_example_is_answered_as_it_is_shown(client: httpx.AsyncClient, player: Player) -> None:
    pending: tuple[Example, asyncio.Task[httpx.Response]] | None = None
    for example in STORY:
        if example.pending:
            request = player.request(example)
            sending = client.request(request.method, request.url, json=request.body, headers=request.headers)
            pending = example, asyncio.create_task(sending)
        elif pending is None:
            await player.play(example)
        else:
            await play_when_possible(player, example)
            player.check(pending[0], await pending[1])
            pending = None


async def play_when_possible(player: Player, example: Example) -> None:
    """Sends an example until the one before it has got so far that it is answered as it is shown."""

    async def played() -> bool:
        try:
            await player.play(example)
        except AssertionError:
            return False
        return True

    await wait_for(played, example.summary)


async def test_every_call_has_an_example_of_a_request_and_its_answer(document: dict[str, Any]) -> None:
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            where = f"{method.upper()} {path}"
            samples = operation["x-codeSamples"]
            statuses = {sample["x-status"] for sample in samples}
            good = {int(status) for status in operation["responses"] if int(status) < 400}
            assert good <= statuses, where
            assert len({sample["label"] for sample in samples}) == len(samples), where
            for status in good:
                for content in operation["responses"][str(status)].get("content", {}).values():
                    assert content["examples"], where
            if "requestBody" in operation:
                assert operation["requestBody"]["content"]["application/json"]["examples"], where


async def test_every_example_belongs_to_a_call(document: dict[str, Any]) -> None:
    calls = {f"{method.upper()} {path}" for path, item in document["paths"].items() for method in item}
    assert {example.call for example in STORY} == calls


# ----------------------------------------------------------------------------------------------------------------- events


async def _answer(state: EchoState) -> EchoState:
    if state["user_input"] == "fail":
        raise RuntimeError("told to fail")
    if state["user_input"] == "wait":
        await asyncio.sleep(30)
    get_stream_writer()(Custom.example)
    return {"agent_response": "You said: And to Bruges, too?", "metadata": {"history": 2}}


@pytest.fixture
async def talker(settings: Settings, stores: Stores, put_agent: PutAgent) -> AsyncIterator[httpx.AsyncClient]:
    """A pod whose agents are `shop`, which writes events of its own, fails and waits, and `echo`, which streams."""
    graph = StateGraph(EchoState)
    graph.add_node("answer", _answer)
    graph.set_entry_point("answer")
    await put_agent("shop", graph="talker")
    await put_agent("echo", config={"chunks": 3})
    pod = Pod(settings, stores, Graphs({"talker": graph.compile(), "echo": echo_graph()}))
    async with served(pod) as client:
        yield client


async def all_kinds_of_events(client: httpx.AsyncClient) -> list[Event]:
    """The events of a turn that completes, one that fails, one that is cancelled, one that streams, one read anew."""
    session_id, found = new_session_id(), list[Event]()
    for words, options in (("Hello", {"message_id": "m-1"}), ("fail", {}), ("stream", {"agent": "echo"})):
        async with speak(client, new_session_id() if options.get("agent") else session_id, words, **options) as stream:
            found += await stream.rest()
    async with speak(client, session_id, "wait") as stream:
        started = await stream.until("turn.started")
        assert (await client.post("/api/chat/shop/cancel", json={"session_id": session_id})).status_code == 202
        found += await stream.rest()
    async with resume(client, session_id, started.data["turn_id"], cursor="99-1") as stream:
        found += await stream.rest()
    return found


async def test_events_of_every_kind_are_sent_as_they_are_described(talker: httpx.AsyncClient) -> None:
    document = (await talker.get("/openapi.json")).json()
    described = {event["title"]: event for event in document["components"]["schemas"]["Event"]["oneOf"]}
    assert described.keys() == KINDS.keys()
    sent = await all_kinds_of_events(talker)
    assert {event.kind for event in sent} == described.keys()
    for event in sent:
        (example,) = described[event.kind]["examples"]
        check_data(document, described[event.kind], event.kind, event.data)
        check_data(document, described[event.kind], event.kind, json.loads(example["data"]))
        assert example["event"] == event.kind == described[event.kind]["properties"]["event"]["const"]
        assert re.fullmatch(described[event.kind]["properties"]["id"]["pattern"], event.id)
    assert Custom.example in [event.data for event in sent]
    assert TurnFailed.example in [event.data for event in sent]


def check_data(document: dict[str, Any], event: dict[str, Any], kind: str, data: dict[str, Any]) -> None:
    """Checks that an event's data has the fields that are described, of their types."""
    schema = event["properties"]["data"]["contentSchema"]
    if "$ref" in schema:
        schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        assert set(schema.get("required", [])) <= data.keys() <= schema["properties"].keys(), kind
    msgspec.convert(data, KINDS[kind].data_type())
