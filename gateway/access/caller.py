"""The sender of a request: its website, tokens and address, as the request states them. `gatekeeper.py` believes or
refuses."""

from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

import msgspec
from starlette.requests import Request
from uuid_utils import uuid7

from gateway.access.audit import Operator
from gateway.access.domains import Origin, normal_domain, read_origin
from gateway.access.tokens import bearer
from gateway.problems import InvalidField

MAX_USER_AGENT = 512

UserToken = msgspec.Meta(max_length=4096, description="A JWT with which the agent's site says who its visitor is")


class Caller:
    """The sender of one request. The domain of the Origin header takes precedence over one in the body."""

    def __init__(self, request: Request) -> None:
        self.request = request
        headers = request.headers
        origins = headers.getlist("origin")
        # A browser sends one Origin; several are treated as `null`.
        self.origin: Origin | None = read_origin(origins[0] if len(origins) == 1 else "null") if origins else None
        self.website_domain = self.origin.domain if self.origin else ""
        self.user_agent = headers.get("user-agent", "")[:MAX_USER_AGENT]
        self.ip_address = address_of(request)
        self.token = bearer(headers.get("authorization", ""))
        # A set, so that two different tokens are noticed: which one is meant must not be guessed.
        self.user_tokens = {headers["x-user-token"]} if "x-user-token" in headers else set()

    def add_body(self, metadata: dict[str, Any], user_token: str | None) -> None:
        """Fills in from the body what the headers leave out. Raises InvalidField."""
        if self.origin is None:
            self.website_domain = normal_domain(_text(metadata, "website_domain", 255))
        if not self.user_agent:
            self.user_agent = _text(metadata, "user_agent", 10_000)[:MAX_USER_AGENT]
        if user_token is not None:
            self.user_tokens.add(user_token)


def address_of(request: Request) -> str:
    """The client address, as the middleware found it (api/middleware/client_address.py); empty when there is none."""
    return request.client.host if request.client else ""


def known_operator(request: Request) -> Operator | None:
    """The operator who makes this request, once the gatekeeper has recognised one."""
    # Read from the scope: request.state would make an object for every request of a visitor.
    operator: Operator | None = request.scope.get("state", {}).get("operator")
    return operator


def kept_address(address: str, *, truncate: bool) -> str:
    """An address as it is stored: whole, or truncated so that it names no single visitor (without the last 8 bits of IPv4,
    the last 80 of IPv6)."""
    if not truncate:
        return address
    try:
        parsed = ip_address(address)
    except ValueError:
        # Of an unknown kind: no part of it is known to be harmless.
        return ""
    if isinstance(parsed, IPv6Address) and parsed.ipv4_mapped is None:
        return str(IPv6Address(int(parsed) >> 80 << 80))
    whole = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else parsed
    return str(IPv4Address(int(whole or 0) >> 8 << 8))


def _text(metadata: dict[str, Any], name: str, longest: int) -> str:
    value = metadata.get(name, "")
    if not isinstance(value, str) or len(value) > longest:
        raise InvalidField(f"metadata.{name}: a string of at most {longest} characters", field=f"metadata.{name}")
    return value


def request_id(request: Request) -> str:
    """The request's id: made here, never taken from the client."""
    if not hasattr(request.state, "request_id"):
        request.state.request_id = str(uuid7())
    return str(request.state.request_id)
