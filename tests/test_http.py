"""How an answer is written: its head and what follows at once in one packet, and a head alone without delay."""

import asyncio
from typing import Any, cast

from gateway.http import JoinedWrites


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
