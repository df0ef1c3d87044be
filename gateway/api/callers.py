"""Who calls: the website a request comes from, its session token, its admin key, its address."""

from typing import Any

from starlette.requests import Request

from gateway.auth import SessionTokens, domain_allowed, is_admin, normal_domain, origin_domain
from gateway.problems import AdminKeyRequired, DomainNotAllowed, InvalidField, TokenInvalid
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
        self.ip_address = client_address(request)
        scheme, _, credentials = headers.get("authorization", "").partition(" ")
        self.token = credentials.strip() if scheme.lower() == "bearer" else ""


def client_address(request: Request) -> str:
    """The client's IP address, as gateway/proxies.py has found it; empty when there is none."""
    return request.client.host if request.client else ""


def _text(metadata: dict[str, Any], name: str, longest: int) -> str:
    value = metadata.get(name, "")
    if not isinstance(value, str) or len(value) > longest:
        raise InvalidField(f"metadata.{name}: a string of at most {longest} characters", field=f"metadata.{name}")
    return value


class Gatekeeper:
    """Decides what a caller may see: shared by all routes."""

    def __init__(self, tokens: SessionTokens, admin_key: str) -> None:
        self._tokens = tokens
        self._admin_key = admin_key

    def require_admin(self, request: Request) -> None:
        """Raises AdminKeyRequired."""
        if not self.is_admin(request):
            raise AdminKeyRequired

    def is_admin(self, request: Request) -> bool:
        return is_admin(request.headers.get("authorization", ""), self._admin_key)

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

    def access(self, request: Request, session_id: str) -> Access:
        """A visitor's, or with the admin key an operator's, access to one session."""
        if self.is_admin(request):
            return Access(authorized=True)
        caller = Caller(request)
        return Access("", caller.website_domain, self.authorized(caller, session_id))
