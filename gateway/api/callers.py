"""Who calls: the website a request comes from, its session token, its admin key, its address."""

from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any

from starlette.requests import Request

from gateway.admin import AdminDoor
from gateway.api.rendering import request_id
from gateway.audit import Operator
from gateway.auth import SessionTokens, domain_allowed, normal_domain, origin_domain
from gateway.problems import AdminKeyRequired, DomainNotAllowed, InvalidField, TokenInvalid
from gateway.settings import TOKEN_BEGINS
from persistence.agents import Agent
from persistence.sessions import Access

MAX_USER_AGENT = 512


class Caller:
    """What a request says of its sender. The domain of the Origin header goes before one in the body."""

    def __init__(self, request: Request, metadata: dict[str, Any] | None = None) -> None:
        headers = request.headers
        metadata = metadata or {}
        origin = headers.get("origin")
        if origin is not None:
            self.website_domain = origin_domain(origin)
        else:
            self.website_domain = normal_domain(_text(metadata, "website_domain", 255))
        self.user_agent = (headers.get("user-agent") or _text(metadata, "user_agent", 10_000))[:MAX_USER_AGENT]
        self.ip_address = address_of(request)
        self.token = bearer(request)


def address_of(request: Request) -> str:
    """The address that a request comes from, as gateway/proxies.py has found it; empty when there is none."""
    return request.client.host if request.client else ""


def bearer(request: Request) -> str:
    """The credentials of an `Authorization: Bearer` header (RFC 6750); empty without."""
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    return credentials.strip() if scheme.lower() == "bearer" else ""


def kept_address(address: str, *, truncate: bool) -> str:
    """An address as it is stored: whole, or without what tells one visitor from the next (the last 8 bits of IPv4, the
    last 80 of IPv6)."""
    if not truncate:
        return address
    try:
        parsed = ip_address(address)
    except ValueError:
        # Nobody knows which part of it names the visitor.
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


class Gatekeeper:
    """Decides what a caller may see: shared by all routes."""

    def __init__(self, tokens: SessionTokens, door: AdminDoor) -> None:
        self._tokens = tokens
        self._door = door

    def require_admin(self, request: Request) -> Operator:
        """The operator who calls. Raises AdminKeyRequired, TlsRequired, RateLimited."""
        operator = self.operator(request)
        if operator is None:
            raise AdminKeyRequired
        return operator

    def operator(self, request: Request) -> Operator | None:
        """The operator, if the request carries an admin key; a visitor's session token is never taken for one.

        Anything else is counted as a guess, once a request, so ask this after all that the credentials may be besides.
        Raises TlsRequired, RateLimited.
        """
        given = bearer(request)
        if not given or given.startswith(TOKEN_BEGINS):
            return None
        if not hasattr(request.state, "operator"):
            address = address_of(request)
            key = self._door.try_key(given, address, request.url.scheme, request.headers, request_id(request))
            request.state.operator = Operator(address, request_id(request), key) if key else None
        operator: Operator | None = request.state.operator
        return operator

    def require_domain(self, caller: Caller, agent: Agent) -> None:
        """Raises DomainNotAllowed."""
        if not domain_allowed(caller.website_domain, agent.definition.allowed_domains):
            raise DomainNotAllowed(f"website domain: {caller.website_domain or 'unknown'}")

    def authorized(self, caller: Caller, session_id: str, agent_id: str | None = None) -> bool:
        """Whether the caller's token is the session's. Raises TokenInvalid when there is one and it is not."""
        if not caller.token:
            return False
        token = self._tokens.verify(caller.token)
        if token is None or token.session_id != session_id or agent_id not in (None, token.agent_id):
            raise TokenInvalid
        return True

    def access(self, request: Request, session_id: str) -> tuple[Access, Operator | None]:
        """A visitor's, or with the admin key an operator's, access to one session."""
        operator = self.operator(request)
        if operator is not None:
            return Access(authorized=True), operator
        caller = Caller(request)
        return Access("", caller.website_domain, self.authorized(caller, session_id)), None
