"""What an attacker sends to break what stores, reads or waits: each gets its refusal, and a visitor beside it is served."""

import asyncio
import gzip
import json
import socket
from collections.abc import AsyncIterator
from typing import Any, ClassVar, TypedDict

import httpx
import msgspec
import pytest
from langgraph.config import get_stream_writer
from langgraph.graph import StateGraph
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway.api import reading
from gateway.app import Pod, Stores
from gateway.graphs.echo import echo_graph
from gateway.graphs.graphs import Graphs
from gateway.problems import InvalidField
from gateway.server.protocol import ConnectionLimits, http_protocol
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.support.raw import RawConnection, ask, request
from tests.support.serving import ADMIN, ADMIN_KEY, served, wait_for
from tests.support.visiting import Flush, Rows, new_session_id, post_message, problem, say

MESSAGE = "/api/chat/shop/message"
JSON = {"Content-Type": "application/json"}
SHORT = ConnectionLimits(head_s=0.3, linger_s=0.3, stall_s=0.3)
LARGE = 8_000_000


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


class State(TypedDict, total=False):
    messages: list[Any]
    user_input: str
    agent_response: str
    context: dict[str, Any]
    metadata: dict[str, Any]


class Model:
    """What a model that was talked into it may say."""

    answers: ClassVar[dict[str, State]] = {
        "text": {"agent_response": "a\0b\ud800c"},
        "metadata": {
            "agent_response": "Hi",
            "metadata": {"a\0": ["\ud800"], "set": {"\0"}, "n": float("nan"), "big": 10**300},
        },
        "context": {"agent_response": "Hi", "context": {"\0": "\0"}},
        "deep": {"agent_response": "Hi", "metadata": {"a": nested(100)}},
        "bytes": {"agent_response": "Hi", "metadata": {"a": object()}},
        "huge": {"agent_response": "a" * LARGE},
    }
    events: ClassVar[dict[str, Any]] = {"event": {"a\0": "\ud800"}, "deep event": nested(100), "odd event": object()}

    async def answer(self, state: State) -> State:
        said = state["user_input"]
        if said in self.events:
            get_stream_writer()(self.events[said])
        return self.answers.get(said, {"agent_response": "Hi"})

    def graph(self) -> Any:
        graph = StateGraph(State)
        graph.add_node("answer", self.answer)
        graph.set_entry_point("answer")
        return graph.compile()


@pytest.fixture
async def pod(settings: Settings, stores: Stores, put_agent: PutAgent) -> Pod:
    """A pod that is not patient, with an agent that echoes and one whose model says what it is told to."""
    await put_agent("shop")
    await put_agent("odd", graph="odd")
    impatient = msgspec.structs.replace(settings, body_timeout_s=0.3)
    return Pod(impatient, stores, Graphs({"echo": echo_graph(), "odd": Model().graph()}))


@pytest.fixture
def lost() -> list[Any]:
    """The addresses of clients whose connections the pod has let go."""
    return []


@pytest.fixture
async def client(pod: Pod, stores: Stores, flush: Flush, lost: list[Any]) -> AsyncIterator[httpx.AsyncClient]:
    """A visitor, served before and after; nothing that was accepted meanwhile is refused by Postgres."""

    class Noting(http_protocol(SHORT)):  # type: ignore[misc]  # a class made at run time
        def connection_lost(self, exc: Exception | None) -> None:
            lost.append(self.client)
            super().connection_lost(exc)

    async with served(pod, http=Noting, timeout_keep_alive=1) as client:
        await say(client, new_session_id())
        yield client
        await say(client, new_session_id())
    await flush()
    assert await stores.outbox.dead_letters() == []


@pytest.fixture
def url(client: httpx.AsyncClient) -> str:
    return str(client.base_url)


def body(**fields: Any) -> dict[str, Any]:
    return {"message": "Hello", "session_id": new_session_id(), **fields}


async def post_raw(client: httpx.AsyncClient, raw: bytes, path: str = MESSAGE, **headers: str) -> httpx.Response:
    return await client.post(
        path, content=raw, headers=JSON | {name.replace("_", "-"): value for name, value in headers.items()}
    )


# ---------------------------------------------------------------------------------------------------- poison the outbox


async def test_poisoning_the_outbox_by_a_nul_in_the_message(client: httpx.AsyncClient) -> None:
    problem(await client.post(MESSAGE, json=body(message="a\0b")), 422, "invalid_field", "message")


async def test_poisoning_the_outbox_by_a_nul_in_metadata(client: httpx.AsyncClient) -> None:
    problem(await client.post(MESSAGE, json=body(metadata={"a\0": 1})), 422, "invalid_field", "metadata")
    problem(await client.post(MESSAGE, json=body(metadata={"a": {"b": "\0"}})), 422, "invalid_field", "metadata.a.b")
    opening = {"agent_id": "shop", "metadata": {"a": "\0"}}
    problem(await client.post("/api/sessions", json=opening), 422, "invalid_field", "metadata.a")


async def test_poisoning_the_outbox_by_half_a_character(client: httpx.AsyncClient) -> None:
    for raw in (b'{"message": "\\ud800", ', b'{"message": "\xed\xa0\x80", ', b'{"message": "\xff", '):
        sent = raw + f'"session_id": "{new_session_id()}"}}'.encode()
        problem(await post_raw(client, sent), 400, "invalid_json")


async def test_poisoning_the_outbox_by_the_user_agent(client: httpx.AsyncClient, url: str, flush: Flush, rows: Rows) -> None:
    session_id = new_session_id()
    raw = json.dumps(body(session_id=session_id)).encode()
    answer = await ask(url, request(MESSAGE, raw, headers={"User-Agent": "a\0b"}))
    assert answer is not None
    assert (answer.status, answer.code) == (400, "invalid_request")
    latin = await ask(url, request(MESSAGE, raw, headers={"User-Agent": "Käse\xff"}))
    assert latin is not None
    assert latin.status == 200
    await flush()
    assert await rows("SELECT 1 FROM agent_sessions WHERE session_id = $1", session_id)
    problem(
        await client.post(MESSAGE, json=body(metadata={"user_agent": "\0"})), 422, "invalid_field", "metadata.user_agent"
    )


async def test_poisoning_the_outbox_by_the_website_domain(client: httpx.AsyncClient, url: str) -> None:
    told = body(metadata={"website_domain": "shop\0.example"})
    problem(await client.post(MESSAGE, json=told), 422, "invalid_field", "metadata.website_domain")
    for origin in ("https://\xff\xfe.example", "https://" + "a" * 300 + ".example", "https://[::1", "\xa0"):
        answer = await ask(url, request(MESSAGE, json.dumps(body()).encode(), headers={"Origin": origin}))
        assert answer is not None
        assert answer.status < 500, origin


async def test_poisoning_the_outbox_by_what_the_model_says(client: httpx.AsyncClient, flush: Flush, rows: Rows) -> None:
    session_id = new_session_id()
    answered = await say(client, session_id, "text", agent="odd")
    assert answered["response"] == "a\ufffdb\ufffdc"
    answered = await say(client, session_id, "metadata", agent="odd")
    metadata = answered["metadata"]
    assert (metadata["a\ufffd"], metadata["set"], metadata["n"], metadata["big"]) == (["\ufffd"], ["\ufffd"], None, 10**300)
    await say(client, session_id, "context", agent="odd")
    await flush()
    stored = await rows("SELECT content FROM agent_messages WHERE role = 'assistant' AND content LIKE 'a%'")
    assert [row[0] for row in stored] == ["a\ufffdb\ufffdc"]
    shown = (await client.get(f"/api/sessions/{session_id}")).json()
    assert shown["context"] == {"\ufffd": "\ufffd"}


async def test_poisoning_the_outbox_by_what_no_store_can_hold(client: httpx.AsyncClient) -> None:
    for message in ("deep", "bytes"):
        session_id = new_session_id()
        answer = await post_message(client, session_id, message, agent="odd")
        problem(answer, 502, "graph_invalid_output")
        await say(client, session_id, agent="odd", if_busy="reject")


async def test_breaking_a_stream_by_what_the_model_writes_to_it(client: httpx.AsyncClient) -> None:
    for message, last in (
        ("event", "turn.completed"),
        ("deep event", "graph_invalid_output"),
        ("odd event", "graph_invalid_output"),
    ):
        answer = await client.post("/api/chat/odd/stream", json=body(message=message))
        assert last in answer.text.strip().rpartition("\n\n")[2], answer.text
        if message == "event":
            assert '{"a\ufffd":"\ufffd"}' in answer.text


async def test_poisoning_an_agent_by_a_nul_in_its_definition(client: httpx.AsyncClient) -> None:
    for fields, field in (({"config": {"a": "\0"}}, "config.a"), ({"allowed_domains": ["a\0"]}, "allowed_domains.0")):
        answer = await client.put("/api/agents/bank", json={"graph": "echo", **fields}, headers=ADMIN)
        problem(answer, 422, "invalid_field", field)
    assert (await client.put("/api/agents/bank", json={"graph": "echo"}, headers=ADMIN)).status_code == 201


# -------------------------------------------------------------------------- make two readers see two different requests


async def test_smuggling_a_request_by_a_second_content_length(url: str) -> None:
    hidden = request("/api/agents", b"", method="GET", headers=ADMIN)
    raw = json.dumps(body()).encode()
    for framing in (
        f"Content-Length: {len(raw)}\r\nContent-Length: {len(raw + hidden)}",
        f"Content-Length: {len(raw)}\r\nTransfer-Encoding: chunked",
        f"Content-Length: +{len(raw)}",
        "Transfer-Encoding: gzip, chunked, identity",
        "Transfer-Encoding: xchunked",
    ):
        head = f"POST {MESSAGE} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{framing}\r\n\r\n"
        async with RawConnection(url) as connection:
            await connection.send(head.encode() + raw + hidden)
            answer = await connection.answer()
            assert answer is not None
            assert (answer.status, answer.code) == (400, "invalid_request"), framing
            # The hidden one is never looked at.
            assert await connection.answer() is None


TRAILED = (
    b"GET /api/agents HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"0\r\nAuthorization: Bearer " + ADMIN_KEY.encode() + b"\r\n\r\n"
)


async def test_forging_a_header_behind_the_body(url: str) -> None:
    """A proxy that guards Authorization, or X-Forwarded-For, guards them in heads."""
    answer = await ask(url, TRAILED)
    assert answer is not None
    assert (answer.status, answer.code) == (401, "admin_key_required")
    honest = await ask(url, request("/api/agents", b"", method="GET", headers=ADMIN))
    assert honest is not None
    assert honest.status == 200


async def test_without_the_guard_a_header_behind_the_body_is_believed(pod: Pod) -> None:
    """The control."""
    async with served(pod, http=HttpToolsProtocol) as client:
        answer = await ask(str(client.base_url), TRAILED)
        assert answer is not None
        assert answer.status == 200


UPGRADE = {"Connection": "Upgrade, HTTP2-Settings", "Upgrade": "h2c", "HTTP2-Settings": "AAMAAABkAARAAAAAAAIAAAAA"}


async def test_smuggling_a_request_behind_one_that_asks_for_another_protocol(url: str) -> None:
    """What follows such a request's head is its body, in whichever pieces it comes, and no request."""
    smuggled = request("/healthz", None, method="GET")
    async with RawConnection(url) as connection:
        await connection.send(request(MESSAGE, None, headers={**UPGRADE, "Content-Length": str(len(smuggled))}))
        await asyncio.sleep(0.05)
        await connection.send(smuggled)
        answer = await connection.answer()
        assert answer is not None
        assert (answer.status, answer.code) == (400, "invalid_json")
        # The connection goes on behind it, with a request of the same kind, and with what came together with that one.
        raw = json.dumps(body()).encode()
        await connection.send(request(MESSAGE, raw, headers=UPGRADE) + request("/readyz", None, method="GET"))
        answers = [await connection.answer(), await connection.answer()]
        assert [one and one.status for one in answers] == [200, 200]
        assert answers[0] is not None and "response" in answers[0].json()
        assert answers[1] is not None and "ready" in answers[1].json()


async def test_without_the_guard_what_follows_is_a_request(pod: Pod) -> None:
    smuggled = request("/healthz", None, method="GET")
    async with served(pod, http=HttpToolsProtocol) as client, RawConnection(str(client.base_url)) as connection:
        await connection.send(request(MESSAGE, None, headers={**UPGRADE, "Content-Length": str(len(smuggled))}))
        assert await connection.answer() is not None
        await connection.send(smuggled)
        answer = await connection.answer()
        assert answer is not None
        assert answer.json() == {"status": "ok"}


async def test_naming_two_sessions_in_one_body(client: httpx.AsyncClient) -> None:
    mine, theirs = new_session_id(), new_session_id()
    await say(client, theirs)
    for name in ("session_id", "session\\u005fid"):
        raw = f'{{"message": "Hello", "session_id": "{mine}", "{name}": "{theirs}"}}'.encode()
        problem(await post_raw(client, raw), 422, "invalid_field", "session_id")
    await say(client, mine)


async def test_naming_another_session_in_the_body_than_in_the_path(client: httpx.AsyncClient) -> None:
    mine, theirs = new_session_id(), new_session_id()
    await say(client, mine)
    await say(client, theirs)
    answer = await client.request("POST", f"/api/sessions/{mine}/end", json={"session_id": theirs})
    assert answer.json()["session_id"] == mine
    await client.request("DELETE", f"/api/sessions/{mine}", json={"session_id": theirs})
    assert (await client.get(f"/api/sessions/{theirs}")).json()["status"] == "active"
    # Nor another agent than in the path.
    problem(await client.post(MESSAGE, json=body(agent_id="odd")), 422, "invalid_field", "agent_id")


async def test_naming_two_sessions_in_one_query(client: httpx.AsyncClient) -> None:
    mine, theirs = new_session_id(), new_session_id()
    turn_id = (await say(client, theirs))["metadata"]["turn_id"]
    stream = f"/api/chat/shop/turns/{turn_id}/stream"
    problem(await client.get(f"{stream}?session_id={mine}&session_id={theirs}"), 422, "invalid_field", "session_id")
    assert (await client.get(f"{stream}?session_id={theirs}")).status_code == 200


async def test_writing_headers_of_the_answer_by_the_path(url: str) -> None:
    for path in ("/widget/x%0d%0aSet-Cookie:%20a=b/panel.js", "/widget/older/panel.js%0d%0aSet-Cookie:%20a=b"):
        answer = await ask(url, request(path, b"", method="GET"))
        assert answer is not None
        assert answer.status in (307, 404)
        assert "set-cookie" not in answer.headers


async def test_saying_it_in_another_encoding(client: httpx.AsyncClient) -> None:
    """What a filter before the gateway cannot read, the gateway does not read either."""
    text = json.dumps(body())
    for raw in (text.encode("utf-16"), text.encode("utf-32"), b"\xef\xbb\xbf" + text.encode()):
        problem(await post_raw(client, raw), 400, "invalid_json")
    utf_7 = await client.post(MESSAGE, content=text, headers={"Content-Type": "application/json; charset=utf-7"})
    problem(utf_7, 415, "unsupported_media_type")
    utf_8 = await client.post(MESSAGE, content=text, headers={"Content-Type": 'application/json; charset="UTF-8"'})
    assert utf_8.status_code == 200


# ------------------------------------------------------------------------------------------------------- exhaust memory


async def test_filling_memory_by_a_compressed_body(client: httpx.AsyncClient) -> None:
    bomb = gzip.compress(json.dumps(body(message=" " * 10_000_000)).encode())
    for encoding in ("gzip", "deflate", "br", "identity, gzip"):
        problem(await post_raw(client, bomb, Content_Encoding=encoding), 415, "unsupported_media_type")
    assert (await post_raw(client, json.dumps(body()).encode(), Content_Encoding="identity")).status_code == 200


async def test_filling_memory_by_a_body_that_never_ends(url: str) -> None:
    """It is refused at its bound; the rest is dropped, and soon not even read."""
    async with RawConnection(url) as connection:
        await connection.send(request(MESSAGE, None, headers={"Transfer-Encoding": "chunked"}))

        async def pour() -> None:
            while True:
                await connection.send(b"10000\r\n" + b" " * 65_536 + b"\r\n")
                await asyncio.sleep(0)

        pouring = asyncio.create_task(pour())
        try:
            answer = await connection.answer()
            assert answer is not None
            assert (answer.status, answer.code) == (413, "body_too_large")
            assert await connection.ended()
        finally:
            pouring.cancel()


async def test_filling_memory_by_announcing_a_large_body(url: str) -> None:
    for length in ("1000000000000", "9" * 18):
        answer = await ask(url, request(MESSAGE, None, headers={"Content-Length": length, "Expect": "100-continue"}))
        assert answer is not None
        assert (answer.status, answer.code) == (413, "body_too_large")


async def test_exhausting_the_stack_by_nesting(client: httpx.AsyncClient) -> None:
    for depth in (17, 65, 500, 1_500, 60_000):
        raw = f'{{"message": "Hello", "session_id": "{new_session_id()}", "metadata": {{"a": {"[" * depth}{"]" * depth}}}}}'
        answer = await post_raw(client, raw.encode())
        assert (answer.status_code, answer.json()["code"]) in ((422, "invalid_field"), (400, "invalid_json")), depth
    assert (await client.post(MESSAGE, json=body(metadata={"a": nested(15)}))).status_code == 200


async def test_filling_the_stores_by_metadata(client: httpx.AsyncClient) -> None:
    for metadata in ({"a": "x" * 16_384}, {str(n): n for n in range(3_000)}):
        problem(await client.post(MESSAGE, json=body(metadata=metadata)), 422, "invalid_field", "metadata")
        opening = {"agent_id": "shop", "metadata": metadata}
        problem(await client.post("/api/sessions", json=opening), 422, "invalid_field", "metadata")
    assert (await client.post(MESSAGE, json=body(metadata={"a": "x" * 16_000}))).status_code == 200


async def test_breaking_numbers(client: httpx.AsyncClient) -> None:
    for number, status in (("1e400", 422), ("-1e999999", 422), ("9" * 5_000, 422), ("NaN", 400), ("-Infinity", 400)):
        raw = f'{{"message": "Hello", "session_id": "{new_session_id()}", "metadata": {{"a": {number}}}}}'.encode()
        answer = await post_raw(client, raw)
        assert answer.status_code == status, number
        assert status == 400 or answer.json()["field"] == "metadata", answer.text
    for number in ("1e308", "9" * 300):
        raw = f'{{"message": "Hello", "session_id": "{new_session_id()}", "metadata": {{"a": {number}}}}}'.encode()
        assert (await post_raw(client, raw)).status_code == 200


async def test_filling_memory_by_header_fields(url: str) -> None:
    get = {"method": "GET"}
    many = request("/healthz", b"", headers={f"X-{n}": "a" for n in range(200)}, **get)
    long = request("/healthz", b"", headers={"X-Long": "a" * 20_000}, **get)
    endless = b"GET /healthz HTTP/1.1\r\nX-Endless: " + b"a" * 2_000_000
    for raw in (many, long, endless):
        answer = await ask(url, raw)
        assert answer is not None
        assert (answer.status, answer.code) == (431, "head_too_large")
    honest = await ask(url, request("/healthz", b"", headers={f"X-{n}": "a" * 100 for n in range(90)}, **get))
    assert honest is not None
    assert honest.status == 200


async def test_filling_memory_by_the_address(url: str) -> None:
    for raw in (request("/" + "a" * 9_000, b"", method="GET"), b"GET /" + b"a" * 2_000_000):
        answer = await ask(url, raw)
        assert answer is not None
        assert (answer.status, answer.code) == (414, "uri_too_long")


async def test_filling_memory_around_the_body(url: str) -> None:
    """Chunk extensions and trailer fields belong to no bound of heads or bodies."""
    head = request(MESSAGE, None, headers={"Transfer-Encoding": "chunked"})
    for filling in (b"1;a=" + b"b" * 2_000_000, b"0\r\nX-Trailer: " + b"b" * 2_000_000):
        answer = await ask(url, head + filling)
        assert answer is not None
        assert (answer.status, answer.code) == (431, "head_too_large")


async def test_filling_memory_by_requests_that_await_no_answers(url: str) -> None:
    async with RawConnection(url) as connection:
        await connection.send(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" * 5_000)
        answers = 0
        while (answer := await connection.answer()) is not None:
            assert answer.status == 200
            answers += 1
    assert answers <= 1 + ConnectionLimits().pipelined
    async with RawConnection(url) as connection:
        await connection.send(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n" * 3)
        for _ in range(3):
            answer = await connection.answer()
            assert answer is not None
            assert answer.status == 200


# --------------------------------------------------------------------------------------------------- hold connections


async def test_holding_a_connection_by_saying_nothing(url: str) -> None:
    async with RawConnection(url) as connection:
        assert await connection.ended()


async def test_holding_a_connection_by_a_head_that_is_never_complete(url: str) -> None:
    for piece in (b"GET /healthz HTTP/1.1\r\nX-A: ", b"\r\n"):
        async with RawConnection(url) as connection:
            await connection.send(piece)

            async def drip(connection: RawConnection = connection, piece: bytes = piece) -> None:
                while True:
                    await connection.send(piece[-1:] if piece == b"\r\n" else b"a")
                    await asyncio.sleep(0.02)

            dripping = asyncio.create_task(drip())
            try:
                answer = await connection.answer()
                assert answer is not None
                assert (answer.status, answer.code) in ((408, "head_too_slow"), (400, "invalid_request"))
                assert await connection.ended()
            finally:
                dripping.cancel()


async def test_holding_a_connection_by_a_body_that_is_never_complete(url: str) -> None:
    raw = json.dumps(body()).encode()
    async with RawConnection(url) as connection:
        await connection.send(request(MESSAGE, raw)[:-5])
        answer = await connection.answer()
        assert answer is not None
        assert (answer.status, answer.code) == (408, "body_too_slow")
        assert await connection.ended()


async def test_holding_a_connection_by_a_body_that_nobody_reads(url: str) -> None:
    async with RawConnection(url) as connection:
        await connection.send(request("/healthz", None, method="GET", headers={"Content-Length": "100"}))
        answer = await connection.answer()
        assert answer is not None
        assert answer.status == 200
        assert await connection.ended()


async def test_holding_memory_by_never_reading_an_answer(client: httpx.AsyncClient, lost: list[Any]) -> None:
    session_id = new_session_id()
    raw = json.dumps({"message": "huge", "session_id": session_id, "message_id": "m1"}).encode()
    loop, address = asyncio.get_running_loop(), (client.base_url.host, client.base_url.port)
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4_096)
        connection.setblocking(False)
        await loop.sock_connect(connection, address)
        await loop.sock_sendall(connection, request("/api/chat/odd/message", raw))
        await wait_for(lambda: connection.getsockname() in lost, "the pod lets the connection go", 30)
        # What was in the network may still arrive, and then the end.
        async with asyncio.timeout(30):
            received = 0
            try:
                while chunk := await loop.sock_recv(connection, 1_000_000):
                    received += len(chunk)
            except ConnectionError:
                pass
    assert received < LARGE
    # The turn went on, and who reads gets its answer.
    again = await post_message(client, session_id, "huge", agent="odd", message_id="m1")
    assert len(again.json()["response"]) == LARGE
    assert again.json()["metadata"]["replayed"]


async def test_leaving_streams_behind_by_a_request_that_waits_behind_them(
    client: httpx.AsyncClient, url: str, pod: Pod
) -> None:
    """uvicorn tells only the request that came last that its client has gone: the stream before it would go on for ever."""
    pod.streams.options = msgspec.structs.replace(pod.streams.options, heartbeat_s=0.1)
    session_id = new_session_id()
    await say(client, session_id)
    for _ in range(3):
        async with RawConnection(url) as connection:
            await connection.send(request(f"/api/sessions/{session_id}/events", None, method="GET"))
            await wait_for(lambda: pod.open_streams.counts, "the stream is open")
            await connection.send(request("/healthz", None, method="GET"))
            assert b"200 OK" in await connection.reader.readuntil(b"\r\n\r\n")
        await wait_for(lambda: not pod.open_streams.counts, "the stream has ended with its connection")


async def test_leaving_streams_behind_that_say_nothing(client: httpx.AsyncClient, url: str, pod: Pod) -> None:
    session_id = new_session_id()
    await say(client, session_id)
    async with RawConnection(url) as connection:
        await connection.send(request(f"/api/sessions/{session_id}/events", None, method="HEAD"))
        head = await connection.reader.readuntil(b"\r\n\r\n")
        assert b"200 OK" in head
        assert b"text/event-stream" in head
        await wait_for(lambda: not pod.open_streams.counts, "nothing is streamed to who reads no body")


async def test_stopping_everybody_by_one_name_among_many(client: httpx.AsyncClient) -> None:
    """Looking for the name that is there twice takes no longer than reading the body."""
    names = [f"{number:05d}" for number in range(25_000)]
    metadata = ",".join(f'"{name}":0' for name in [*names, names[-1]])
    raw = f'{{"message":"Hello","session_id":"{new_session_id()}","metadata":{{{metadata}}}}}'.encode()
    async with asyncio.timeout(4):
        problem(await post_raw(client, raw), 422, "invalid_field", "metadata.24999")


def test_stopping_everybody_by_one_long_name_over_many_values() -> None:
    class Name(str):
        used = 0

        def __format__(self, form: str) -> str:
            Name.used += 1
            return str(self)

    reading.check_text([0] * 1_000, Name("metadata"))
    assert Name.used == 0, "it would be copied for each value"
    with pytest.raises(InvalidField, match="NUL characters") as refused:
        reading.check_text({"a": ["b", "\0"]}, "metadata")
    assert refused.value.field == "metadata.a.1"


async def test_being_sent_back_all_that_was_sent(client: httpx.AsyncClient) -> None:
    answer = await client.post(MESSAGE, json=body(**{"x" * 200_000: 1}))
    assert answer.status_code == 422
    assert len(answer.content) < 2_000
    assert answer.json()["field"].startswith("xxx")


# ---------------------------------------------------------------------------------------------------------- what is left


async def test_confusing_the_parser_by_what_is_no_http(url: str) -> None:
    for raw in (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 50,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /healthz HTTP/1.1\nHost: a\n\n",
        b"GET http://[::1 HTTP/1.1\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nHost : a\r\n\r\n",
        b"GET /healthz HTTP/1.1\r\nX: a\r\n folded\r\n\r\n",
    ):
        answer = await ask(url, raw)
        assert answer is not None, raw
        assert (answer.status, answer.code) == (400, "invalid_request"), raw
        assert answer.headers["connection"] == "close"


async def test_breaking_the_query(client: httpx.AsyncClient) -> None:
    for query, field in (
        ("status=%ff", "status"),
        ("website_domain=%ed%a0%80", "website_domain"),
        ("limit=1&limit=2", "limit"),
        ("%ff=1", "query"),
        ("limit=1e9", "limit"),
        ("cursor=" + "a" * 4_000, "cursor"),
    ):
        problem(await client.get(f"/api/sessions?{query}", headers=ADMIN), 422, "invalid_field", field)
    assert (await client.get("/api/sessions?limit=1&status=active", headers=ADMIN)).status_code == 200


async def test_breaking_the_path(client: httpx.AsyncClient, url: str) -> None:
    for path, code in (
        ("/api/sessions/session_1234567890%00", "session_not_found"),
        ("/api/sessions/session_1234567890%ff%fe", "session_not_found"),
        ("/api/sessions/session_1234567890%zz", "session_not_found"),
        ("/api/sessions/%2e%2e%2fagents", "not_found"),
        ("/api/chat/%00", "agent_not_found"),
        ("/api/chat/%2e%2e", "agent_not_found"),
    ):
        answer = await ask(url, request(path, b"", method="GET"))
        assert answer is not None
        assert (answer.status, answer.code) == (404, code), path


async def test_breaking_the_headers_that_are_read(client: httpx.AsyncClient, url: str) -> None:
    session_id = new_session_id()
    await say(client, session_id)
    events = f"/api/sessions/{session_id}/events"
    for cursor in ("9" * 400 + "-1", "1-" + "9" * 400, "-1-1", "1", "\xb2-1", "1-1\t2"):
        answer = await ask(url, request(events, b"", method="GET", headers={"Last-Event-ID": cursor}))
        assert answer is not None
        assert (answer.status, answer.code, answer.json()["field"]) == (422, "invalid_field", "Last-Event-ID"), cursor
    for key in ("a b", "\xff", "a" * 129, '"', "", '""', '"a'):
        answer = await ask(url, request(MESSAGE, json.dumps(body()).encode(), headers={"Idempotency-Key": key}))
        assert answer is not None
        assert (answer.status, answer.code, answer.json()["field"]) == (422, "invalid_field", "Idempotency-Key"), key
    for key in ("a", '"a"'):
        answer = await ask(url, request(MESSAGE, json.dumps(body()).encode(), headers={"Idempotency-Key": key}))
        assert answer is not None
        assert answer.status == 200, key
