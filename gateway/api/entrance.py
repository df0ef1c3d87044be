"""The agent and the access of a request."""

from starlette.requests import Request

from gateway.access.caller import address_of
from gateway.agents import Agents
from gateway.limits.limiter import Limiter
from gateway.problems import AgentNotFound
from persistence.model.agents import Agent


async def load_agent(agents: Agents, reference: str, limiter: Limiter, request: Request) -> Agent:
    """The agent that a visitor names. Raises AgentNotFound, and RateLimited for who names many that are not there."""
    address = address_of(request)
    limiter.check_misses(address)
    try:
        return await agents.load(reference)
    except AgentNotFound:
        limiter.charge_miss(address)
        raise
