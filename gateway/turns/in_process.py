"""The Python API: one message to an agent without HTTP."""

from typing import Any, Protocol

import msgspec

from gateway.access.domains import normal_domain
from gateway.limits.admission import Admission
from gateway.problems import AgentInactive, InvalidField
from gateway.streams.log import TurnLog
from gateway.turns.request import Attached, SessionId, TurnRequest, TurnResult
from gateway.turns.turns import Turns
from persistence.model.agents import Agent
from persistence.model.session import Access
from persistence.model.storable import storable_value


class FindsAgents(Protocol):
    """The agents, which are no layer below this one."""

    async def load(self, reference: str) -> Agent: ...


class AgentRuntime:
    """Answers visitors' messages: what the HTTP layer calls, and a Python API for everybody else."""

    def __init__(self, agents: FindsAgents, turns: Turns) -> None:
        self._agents = agents
        self._turns = turns

    async def execute_text(
        self, agent_id: str, user_input: str, session_id: str, metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """One text message to an agent (UUID or name); the session is created if there is none.

        Returns {"response": str, "metadata": dict}. Raises a Problem.
        """
        metadata = metadata or {}
        agent = await self._agents.load(agent_id)
        if not agent.definition.active:
            raise AgentInactive
        try:
            msgspec.convert(session_id, SessionId)
        except msgspec.ValidationError as error:
            raise InvalidField("session_id: 16 to 255 of A-Z a-z 0-9 _ . : -", field="session_id") from error
        if storable_value([user_input, metadata]) != [user_input, metadata]:
            raise InvalidField("user_input, metadata: NUL and lone surrogates cannot be stored", field="user_input")
        request = TurnRequest(
            session_id=session_id,
            message=user_input,
            metadata=metadata,
            access=Access(agent.id, normal_domain(str(metadata.get("website_domain", "")))),
            user_agent=str(metadata.get("user_agent", "")),
        )
        result = await self.execute(agent, request)
        return {"response": result.response, "metadata": result.metadata}

    async def execute(self, agent: Agent, request: TurnRequest, admission: Admission | None = None) -> TurnResult:
        """One turn of an agent. Raises a Problem."""
        return await self._turns.execute(agent, request, admission)

    async def stream(self, agent: Agent, request: TurnRequest, admission: Admission | None = None) -> TurnLog | Attached:
        """One turn of an agent as a log of events, or the turn that answers the message already. Raises a Problem."""
        return await self._turns.stream(agent, request, admission)
