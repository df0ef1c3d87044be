"""The client's address behind proxies: what is believed, and that only addresses are."""

from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from gateway.api.middleware.client_address import ClientAddress
from gateway.settings import Settings

PROXY = "10.0.0.1"
VISITOR = "198.51.100.7"


async def seen(peer: str | None, *forwarded: str, trusted: str = "10.0.0.0/8", proto: str | None = None) -> tuple[str, str]:
    """The address and the scheme that the application sees of a request with these X-Forwarded-For lines."""
    found: dict[str, Any] = {}

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        found.update(scope)

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        raise AssertionError("nothing is sent")

    headers = [(b"x-forwarded-for", line.encode("latin-1")) for line in forwarded]
    headers += [(b"x-forwarded-proto", proto.encode())] if proto is not None else []
    scope = {"type": "http", "client": (peer, 4711) if peer else None, "scheme": "http", "headers": headers}
    networks = Settings(trusted_proxies=trusted).trusted_networks
    await ClientAddress(app, trusted=networks)(scope, receive, send)
    return (found["client"][0] if found["client"] else ""), found["scheme"]


async def test_behind_a_proxy_the_client_is_who_called_it() -> None:
    assert await seen(PROXY, VISITOR) == (VISITOR, "http")
    assert await seen(PROXY, "2001:db8::7") == ("2001:db8::7", "http")


async def test_nobody_else_is_believed() -> None:
    assert await seen("203.0.113.5", VISITOR, proto="https") == ("203.0.113.5", "http")
    assert await seen(PROXY, VISITOR, trusted="", proto="https") == (PROXY, "http")


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["192.0.2.66, 198.51.100.7"], VISITOR),
        (["127.0.0.1, 10.0.0.9, 198.51.100.7"], VISITOR),
        (["192.0.2.66, 198.51.100.7, 10.0.0.2, 10.0.0.3"], VISITOR),
        (["192.0.2.66", "198.51.100.7"], VISITOR),
        (["192.0.2.66, 198.51.100.7", "10.0.0.2"], VISITOR),
        (["10.0.0.2, 10.0.0.3"], "10.0.0.2"),
    ],
)
async def test_the_last_address_that_is_no_proxy_is_the_client(lines: list[str], expected: str) -> None:
    """What stands before it the client may have written itself."""
    assert (await seen(PROXY, *lines))[0] == expected


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("198.51.100.7:4711", VISITOR),
        ("[2001:db8::7]:4711", "2001:db8::7"),
        ("[2001:db8::7]", "2001:db8::7"),
        ("::ffff:198.51.100.7", VISITOR),
        ("2001:DB8:0:0:0:0:0:7", "2001:db8::7"),
        ("fe80::7%eth0", "fe80::7"),
        ("  198.51.100.7\t", VISITOR),
    ],
)
async def test_an_address_is_read_however_it_is_written(written: str, expected: str) -> None:
    assert (await seen(PROXY, written))[0] == expected


@pytest.mark.parametrize(
    "garbage",
    [
        "",
        " ",
        ",",
        "unknown",
        "_hidden",
        "256.1.1.1",
        "1.2.3",
        "3405803783",
        "0x7f.1",
        "127.0.0.1:port",
        "[::1",
        "[::1]x",
        "1.2.3.4%x",
        "<script>",
        "'; DROP TABLE",
        "\xff\xfe",
        "1" * 100_000,
        "198.51.100.7 198.51.100.8",
    ],
)
async def test_what_is_no_address_is_not_taken_for_one(garbage: str) -> None:
    """It is known who called the proxy that wrote it: that one stays."""
    assert (await seen(PROXY, garbage))[0] == PROXY
    assert (await seen(PROXY, f"{VISITOR}, {garbage}, 10.0.0.2"))[0] == "10.0.0.2"
    assert (await seen(PROXY, f"{garbage}, {VISITOR}"))[0] == VISITOR


async def test_a_header_of_any_length_is_taken_apart_from_its_end_alone() -> None:
    assert (await seen(PROXY, "192.0.2.66, " * 50_000 + VISITOR))[0] == VISITOR
    # All of them proxies: the search ends somewhere.
    assert (await seen(PROXY, ", ".join(["10.0.0.2"] * 50_000)))[0] == "10.0.0.2"
    assert (await seen(PROXY, *[VISITOR] + ["10.0.0.2"] * 5_000))[0] == "10.0.0.2"


async def test_where_all_are_believed_the_first_address_is_the_client() -> None:
    """Right only where the balancer drops what a client wrote, as compose.yaml's does."""
    assert (await seen("203.0.113.5", VISITOR, trusted="*"))[0] == VISITOR
    assert (await seen("203.0.113.5", f"{VISITOR}, 192.0.2.66", trusted="*"))[0] == VISITOR
    assert (await seen("203.0.113.5", f"garbage, {VISITOR}", trusted="*"))[0] == VISITOR


async def test_a_peer_without_an_address_is_none() -> None:
    assert (await seen(None))[0] == ""
    assert (await seen(None, VISITOR))[0] == ""
    assert (await seen(None, VISITOR, trusted="*"))[0] == VISITOR


@pytest.mark.parametrize(("proto", "expected"), [("https", "https"), ("HTTPS", "https"), ("gopher", "http"), ("", "http")])
async def test_the_scheme_is_the_one_that_the_proxy_was_called_with(proto: str, expected: str) -> None:
    assert (await seen(PROXY, VISITOR, proto=proto))[1] == expected
