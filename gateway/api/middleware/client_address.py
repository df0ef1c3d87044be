"""The client's address behind proxies: for limits, and stored with sessions.

Each proxy appends its caller's address to X-Forwarded-For. The header is read from its end, as far as the proxies are
trusted; a client may have written anything before that.
"""

from collections.abc import Sequence
from functools import lru_cache
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address

from starlette.types import ASGIApp, Receive, Scope, Send

MAX_HOPS = 32
"""Most entries read, however many a client has written before them."""
MAX_ADDRESS = 64
"""Longest entry read, in characters."""


class ClientAddress:
    """ASGI middleware: replaces the proxy's address and scheme in the scope by the client's.

    `trusted` are the networks of trusted proxies; None trusts every address, which is right only where the nearest proxy
    drops a client's own header. An entry that is no address ends the search at the address found before it.
    """

    def __init__(self, app: ASGIApp, trusted: Sequence[IPv4Network | IPv6Network] | None = ()) -> None:
        self._app = app
        self._trusted = trusted

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            peer = _address(scope["client"][0]) if scope.get("client") else None
            client = peer
            if self._trusts(peer):
                client = self._behind(peer, scope)
                scheme = _last(scope, b"x-forwarded-proto")
                if scheme in ("http", "https"):
                    scope["scheme"] = scheme
            scope["client"] = (str(client), 0) if client is not None else None
        await self._app(scope, receive, send)

    def _trusts(self, address: IPv4Address | IPv6Address | None) -> bool:
        if self._trusted is None:
            return True
        return address is not None and any(address in network for network in self._trusted)

    def _behind(self, peer: IPv4Address | IPv6Address | None, scope: Scope) -> IPv4Address | IPv6Address | None:
        lines = [value for name, value in scope["headers"] if name == b"x-forwarded-for"]
        client = peer
        hops = 0
        for line in reversed(lines):
            # Splits the last entries only, however long the line is.
            for hop in reversed(line.rsplit(b",", MAX_HOPS)):
                hops += 1
                found = _address(hop.decode("latin-1").strip()) if len(hop) <= MAX_ADDRESS else None
                if found is None or hops > MAX_HOPS:
                    return client
                client = found
                if not self._trusts(client):
                    return client
        return client


def _last(scope: Scope, wanted: bytes) -> str:
    values = [value for name, value in scope["headers"] if name == wanted]
    return values[-1].decode("latin-1").strip().lower() if values else ""


@lru_cache(maxsize=4096)
def _address(text: str) -> IPv4Address | IPv6Address | None:
    """The address of an entry, its port and interface removed, IPv4-mapped IPv6 as IPv4. None for every other text."""
    if text.startswith("["):
        host, closed, port = text[1:].partition("]")
        if not closed or not (port == "" or (port[0] == ":" and port[1:].isdecimal())):
            return None
    elif text.count(":") == 1:
        host, _, port = text.partition(":")
        if not port.isdecimal():
            return None
    else:
        host = text
    try:
        address = ip_address(host.partition("%")[0] if ":" in host else host)
    except ValueError:
        return None
    return (address.ipv4_mapped or address) if isinstance(address, IPv6Address) else address
