"""How an answer is written: its head and what follows at once in one packet, and a head alone without delay."""

import ast
import asyncio
import inspect
import json
from typing import Any, cast

import httpx
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

from gateway.server.protocol import JoinedWrites
from tests.conftest import PutAgent
from tests.support.raw import RawConnection
from tests.support.visiting import new_session_id


class Wire:
    """A transport that remembers its writes."""

    def __init__(self) -> None:
        self.written: list[bytes] = []
        self.closed = False

    def write(self, data: bytes) -> None:
        assert not self.closed, "nothing may be written any more"
        self.written.append(data)

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


def joined() -> tuple[Wire, JoinedWrites]:
    wire = Wire()
    return wire, JoinedWrites(cast(Any, wire), asyncio.get_running_loop())


async def test_head_and_body_are_one_packet() -> None:
    wire, writes = joined()
    writes.write(b"head ")
    writes.write(b"body")
    await asyncio.sleep(0)
    assert wire.written == [b"head body"]
    writes.write(b"more")
    assert wire.written == [b"head body", b"more"], "only the head waits"


async def test_a_head_that_nothing_follows_goes_out_by_itself() -> None:
    wire, writes = joined()
    writes.write(b"head")
    await asyncio.sleep(0)
    assert wire.written == [b"head"]
    writes.write(b"event")
    assert wire.written == [b"head", b"event"]


async def test_a_head_is_written_before_the_connection_closes_and_never_after() -> None:
    wire, writes = joined()
    writes.write(b"head")
    writes.close()
    await asyncio.sleep(0)
    assert (wire.written, wire.closed) == ([b"head"], True)
    lost, writes = joined()
    writes.write(b"head")
    lost.close()
    await asyncio.sleep(0)
    assert lost.written == [], "the client has gone"


def test_it_has_all_of_a_transport_that_uvicorn_uses() -> None:
    used = {
        node.attr
        for node in ast.walk(ast.parse(inspect.getsource(RequestResponseCycle)))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute) and node.value.attr == "transport"
    }
    assert "write" in used
    assert {name for name in used if not hasattr(JoinedWrites, name)} == set()


async def test_a_body_that_waits_to_be_asked_for_is_asked_for(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop")
    body = json.dumps({"message": "Hello", "session_id": new_session_id()}).encode()
    head = (
        "POST /api/chat/shop/message HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n"
        f"Expect: 100-continue\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    async with RawConnection(str(client.base_url)) as connection:
        await connection.send(head.encode())
        asked = await connection.answer()
        assert asked is not None and asked.status == 100
        await connection.send(body)
        answer = await connection.answer()
        assert answer is not None and answer.status == 200
        assert answer.json()["response"]
