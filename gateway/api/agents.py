"""`/api/agents`: agent definitions, for operators."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.agents import Agents
from gateway.api.callers import Gatekeeper
from gateway.api.rendering import BodyBounds, answer, check_text, read_body
from gateway.runtime import Graphs
from persistence.agents import Agent, AgentDefinition


class AgentAnswer(AgentDefinition, frozen=True, forbid_unknown_fields=False, kw_only=True):
    """An agent: its UUID, its name, its definition."""

    id: str
    name: str


class AgentList(msgspec.Struct):
    """Every agent, by name."""

    agents: list[AgentAnswer]


def view(agent: Agent) -> AgentAnswer:
    """An agent as it is shown."""
    return AgentAnswer(id=agent.id, name=agent.name, **msgspec.structs.asdict(agent.definition))


class AgentsApi:
    """The routes about agents."""

    def __init__(self, agents: Agents, graphs: Graphs, gatekeeper: Gatekeeper, *, bounds: BodyBounds) -> None:
        self._agents = agents
        self._graphs = graphs
        self._gatekeeper = gatekeeper
        self._bounds = bounds
        self._decoder = msgspec.json.Decoder(AgentDefinition)

    async def list(self, request: Request) -> Response:
        """GET /api/agents"""
        self._gatekeeper.require_admin(request)
        return answer(AgentList([view(agent) for agent in await self._agents.list()]))

    async def show(self, request: Request) -> Response:
        """GET /api/agents/{agent_id}"""
        self._gatekeeper.require_admin(request)
        return answer(view(await self._agents.load(request.path_params["agent_id"])))

    async def put(self, request: Request) -> Response:
        """PUT /api/agents/{agent_id}"""
        self._gatekeeper.require_admin(request)
        definition = await read_body(request, self._decoder, self._bounds)
        for name in definition.__struct_fields__:
            check_text(getattr(definition, name), name)
        self._graphs.check(definition)
        agent, created = await self._agents.put(request.path_params["agent_id"], definition)
        return answer(view(agent), 201 if created else 200)

    async def delete(self, request: Request) -> Response:
        """DELETE /api/agents/{agent_id}"""
        self._gatekeeper.require_admin(request)
        await self._agents.delete(request.path_params["agent_id"])
        return Response(status_code=204)
