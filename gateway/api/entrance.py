"""Who asks for what: the agent of a request and the caller's access, before a handler does anything else."""

from typing import NoReturn

from starlette.requests import Request

from gateway.access.caller import Caller, address_of
from gateway.access.gatekeeper import Gatekeeper
from gateway.agents import Agents
from gateway.limits.limiter import Limiter
from gateway.problems import (
    AgentNotFound,
    DomainNotAllowed,
    IdentityRequired,
    Problem,
    SessionErased,
    SessionNotFound,
    UserTokenInvalid,
)
from gateway.turns.refusals import existing
from persistence.errors import PersistenceError
from persistence.history import OPERATOR, History
from persistence.model.agents import Agent
from persistence.model.session import Access
from persistence.redis.outcomes import Hot


class Entrance:
    """Shared by all routes of visitors. Misses are charged to the client's address, so that ids cannot be guessed."""

    def __init__(self, agents: Agents, history: History, gatekeeper: Gatekeeper, limiter: Limiter) -> None:
        self._agents = agents
        self._history = history
        self._gatekeeper = gatekeeper
        self._limiter = limiter

    async def load_agent(self, reference: str, request: Request) -> Agent:
        """The agent that a visitor names. Raises AgentNotFound, and RateLimited after too many misses."""
        address = address_of(request)
        self._limiter.check_misses(address)
        try:
            return await self._agents.load(reference)
        except AgentNotFound:
            self._limiter.charge_miss(address)
            raise

    async def enter(self, request: Request) -> tuple[Agent, Caller]:
        """The agent of the path and its caller, whose website is checked before the rest of the request is read.

        Raises AgentNotFound, DomainNotAllowed, RateLimited.
        """
        agent = await self.load_agent(request.path_params["agent_id"], request)
        caller = Caller(request)
        self._gatekeeper.require_origin(caller, agent)
        return agent, caller

    async def access(self, request: Request, session_id: str) -> Access:
        """The caller's access to a session whose agent the path does not name: the session itself names it.

        Raises the gatekeeper's problems about tokens; every other reason to refuse a visitor is SessionNotFound.
        """
        caller = Caller(request)
        self._limiter.check_misses(caller.ip_address)
        found = agent = None
        failed: Exception = SessionNotFound()
        try:
            found = existing(await self._history.find_session(session_id, OPERATOR))
            agent = await self._agents.load(found.session.agent_id)
        except (Problem, PersistenceError) as error:
            # Not raised yet: an operator may erase a damaged session.
            failed = error
        # Asked first, so that a site key does not count as a guess at the admin key.
        site = self._gatekeeper.is_site(caller, agent) if agent else self._gatekeeper.is_some_site(caller)
        if not site and self._gatekeeper.operator(request) is not None:
            return OPERATOR
        if isinstance(failed, SessionErased):
            # Only the erased session's website is left; the store refuses every caller by it.
            return Access("", caller.website_domain)
        if found is None or agent is None:
            self._refuse_absent(caller, session_id, failed, is_site=site)
        return self._visitor_access(caller, agent, found, session_id)

    def _refuse_absent(self, caller: Caller, session_id: str, failed: Exception, *, is_site: bool) -> NoReturn:
        absent = isinstance(failed, (SessionNotFound, AgentNotFound))
        if absent:
            self._limiter.charge_miss(caller.ip_address)
        if not is_site:
            self._gatekeeper.refuse_absent(caller, session_id)
        if absent:
            raise SessionNotFound from failed
        raise failed

    def _visitor_access(self, caller: Caller, agent: Agent, found: Hot, session_id: str) -> Access:
        try:
            return self._gatekeeper.access(caller, agent, session_id)
        except (DomainNotAllowed, IdentityRequired) as problem:
            raise SessionNotFound from problem
        except UserTokenInvalid as problem:
            session = found.session
            elsewhere = caller.website_domain not in ("", session.website_domain)
            if elsewhere or session.user_id not in ("", problem.expired_user):
                raise SessionNotFound from problem
            # Reveals nothing: the session has no user, or the token named that user until it expired.
            raise
