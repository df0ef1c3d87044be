"""Decides what a caller may do, by the website, tokens and keys of its request.

No store is asked here, so a refusal is the same for sessions that exist and for those that do not. What depends on the
session itself, `refusal` of lua/lib decides inside the script that touches the session.
"""

from hashlib import sha256

from starlette.requests import Request

from gateway.access.admin_key import AdminAccess
from gateway.access.audit import Operator
from gateway.access.caller import Caller, address_of, request_id
from gateway.access.domains import AllowedDomains
from gateway.access.tokens import Expired, SessionToken, SessionTokens, bearer, is_one_of, read_user_token
from gateway.problems import (
    AdminKeyRequired,
    DomainNotAllowed,
    IdentityRequired,
    SessionNotFound,
    TlsRequired,
    TokenInvalid,
    TokenRequired,
    UserTokenInvalid,
)
from gateway.settings import TOKEN_BEGINS
from persistence.model.agents import Agent
from persistence.model.session import Access


def _digest(key: str) -> bytes:
    return sha256(key.encode(errors="surrogatepass")).digest()


MINTED = "gs_"
"""Prefix of minted session ids. Without a token all of them are refused alike, whether the session exists or not."""

KNOWN_AGENTS = 10_000


class Gatekeeper:
    """The access of callers to agents and sessions; one for all routes."""

    def __init__(self, tokens: SessionTokens, admin: AdminAccess) -> None:
        self._tokens = tokens
        self._admin = admin
        self._domains: dict[str, AllowedDomains] = {}
        # As digests: the keys themselves are kept in one place only.
        self._site_keys: set[bytes] = set()

    def require_admin(self, request: Request) -> Operator:
        """The operator who calls. Raises AdminKeyRequired, TlsRequired, RateLimited."""
        operator = self.operator(request)
        if operator is None:
            raise AdminKeyRequired
        return operator

    def operator(self, request: Request) -> Operator | None:
        """The operator, if the request carries an admin key. Raises TlsRequired, RateLimited.

        Other credentials count as a failed attempt, once a request: check first whether they are a site key. Session tokens
        are told by their form and do not count.
        """
        given = bearer(request.headers.get("authorization", ""))
        if not given or given.startswith(TOKEN_BEGINS):
            return None
        if not hasattr(request.state, "operator"):
            address = address_of(request)
            key = self._admin.try_key(given, address, request.url.scheme, request.headers, request_id(request))
            request.state.operator = Operator(address, request_id(request), key) if key else None
        operator: Operator | None = request.state.operator
        return operator

    def domains(self, agent: Agent) -> AllowedDomains:
        """The agent's allowed domains, parsed once per definition."""
        entries = agent.definition.allowed_domains
        known = self._domains.get(agent.id)
        if known is None or (known.entries is not entries and known.entries != entries):
            if len(self._domains) >= KNOWN_AGENTS:
                self._domains.clear()
            known = self._domains[agent.id] = AllowedDomains(entries)
        known.entries = entries
        return known

    def require_origin(self, caller: Caller, agent: Agent) -> None:
        """Raises DomainNotAllowed for a website that may not use the agent. A request without Origin passes: `access`
        decides about it, which knows the tokens that may take the place of an Origin."""
        if caller.origin is None:
            return
        try:
            self._require_domain(caller, agent, False)
        except DomainNotAllowed:
            if not self._is_trusted(caller, agent):
                raise

    def require_website(self, caller: Caller, agent: Agent) -> None:
        """Raises DomainNotAllowed for a website that may not use the agent, and for requests that name none."""
        if not self._is_trusted(caller, agent):
            token = self._tokens.verify(caller.token) if caller.token else None
            self._require_domain(caller, agent, token is not None and token.agent_id == agent.id)

    def access(self, caller: Caller, agent: Agent, session_id: str, *, begins: bool = False) -> Access:
        """A caller's access to a session of an agent; `begins` when a turn or a session is to begin.

        Raises TokenInvalid, TokenRequired, DomainNotAllowed, UserTokenInvalid, IdentityRequired; and SessionNotFound where
        any of these would tell that the session exists.
        """
        trusted = self._is_trusted(caller, agent)
        token = None
        if caller.token and not trusted:
            token = self._token(caller, session_id)
            if token.agent_id != agent.id:
                raise TokenInvalid
        if not trusted and token is None and session_id.startswith(MINTED):
            raise TokenRequired
        if not trusted:
            self._require_domain(caller, agent, token is not None)
        if agent.definition.require_token and token is None and not trusted:
            raise SessionNotFound
        user_id = self._user(caller, agent)
        if token is not None and token.user_id:
            if user_id not in ("", token.user_id):
                raise SessionNotFound
            user_id = token.user_id
        self._require_identity(agent, user_id, begins or not trusted)
        return Access(agent.id, caller.website_domain, trusted or token is not None, user_id, trusted)

    def newcomer(self, caller: Caller, agent: Agent) -> Access:
        """The access of a caller who gets a minted session. Raises as `access` does."""
        trusted = self._is_trusted(caller, agent)
        if not trusted:
            self._require_domain(caller, agent, False)
        user_id = self._user(caller, agent)
        self._require_identity(agent, user_id, True)
        return Access(agent.id, caller.website_domain, False, user_id, trusted)

    def refuse_absent(self, caller: Caller, session_id: str) -> None:
        """Raises what `access` raises for an existing session, as far as that does not depend on the session's agent."""
        if caller.token:
            self._token(caller, session_id)
        elif session_id.startswith(MINTED):
            raise TokenRequired

    def _token(self, caller: Caller, session_id: str) -> SessionToken:
        """The request's token, if it is this session's. Raises TokenInvalid; SessionNotFound when it is another
        website's."""
        token = self._tokens.verify(caller.token)
        if token is None or token.session_id != session_id:
            raise TokenInvalid
        if caller.origin is not None and caller.origin.domain != token.website_domain:
            raise SessionNotFound
        return token

    def is_site(self, caller: Caller, agent: Agent) -> bool:
        """Whether one of the site's servers calls, with a site key of the agent."""
        found = bool(caller.token) and is_one_of(caller.token, agent.definition.site_keys)
        if found:
            if len(self._site_keys) >= KNOWN_AGENTS:
                self._site_keys.clear()
            self._site_keys.add(_digest(caller.token))
        return found

    def is_some_site(self, caller: Caller) -> bool:
        """Whether the credentials are a site key that this pod has seen, of whatever agent. It grants nothing: it only keeps
        such a key from counting as a failed attempt at the admin key when the session, and so its agent, is unknown."""
        return bool(caller.token) and _digest(caller.token) in self._site_keys

    def _is_trusted(self, caller: Caller, agent: Agent) -> bool:
        """Whether the site's server or an operator calls."""
        if not caller.token:
            return False
        if self.is_site(caller, agent):
            return True
        try:
            return self.operator(caller.request) is not None
        except TlsRequired:
            # Visitors are told about their token, never about the admin key; the audit log has the reason.
            return False

    def _require_domain(self, caller: Caller, agent: Agent, has_token: bool) -> None:
        allowed = self.domains(agent)
        if not (has_token or allowed.any if caller.origin is None else allowed.allow(caller.origin)):
            raise DomainNotAllowed(f"website domain: {caller.website_domain if caller.origin else 'unknown'}")

    def _user(self, caller: Caller, agent: Agent) -> str:
        """The verified user, or ''. Raises UserTokenInvalid."""
        if not caller.user_tokens:
            return ""
        if len(caller.user_tokens) > 1:
            raise UserTokenInvalid("the one in the body and the one in the header differ")
        try:
            return read_user_token(next(iter(caller.user_tokens)), agent.definition.site_keys)
        except ValueError as error:
            problem = UserTokenInvalid(str(error))
            problem.expired_user = error.user_id if isinstance(error, Expired) else None
            raise problem from error

    def _require_identity(self, agent: Agent, user_id: str, concerned: bool) -> None:
        if agent.definition.require_identity and concerned and not user_id:
            raise IdentityRequired
