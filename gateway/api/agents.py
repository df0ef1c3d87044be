"""`/api/agents`: agent definitions, for operators."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from gateway.access.audit import Operator, audited, changed
from gateway.access.gatekeeper import Gatekeeper
from gateway.access.tokens import fingerprint
from gateway.agents import Agents
from gateway.api.answers import answer
from gateway.api.reading import BodyBounds, check_text, read_body
from gateway.graphs.graphs import Graphs
from persistence.model.agents import Agent, AgentDefinition


class AgentAnswer(AgentDefinition, frozen=True, forbid_unknown_fields=False, kw_only=True):
    """An agent: its UUID, its name, its definition."""

    id: str
    name: str


class AgentList(msgspec.Struct):
    """Every agent, by name."""

    agents: list[AgentAnswer]


def view(agent: Agent) -> AgentAnswer:
    """An agent as it is shown: of its site keys the fingerprints alone."""
    shown = msgspec.structs.asdict(agent.definition)
    shown["site_keys"] = tuple(map(fingerprint, agent.definition.site_keys))
    return AgentAnswer(id=agent.id, name=agent.name, **shown)


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
        operator = self._gatekeeper.require_admin(request)
        with audited("agents_listed", operator):
            agents = await self._agents.list()
        return answer(AgentList([view(agent) for agent in agents]))

    async def show(self, request: Request) -> Response:
        """GET /api/agents/{agent_id}"""
        operator = self._gatekeeper.require_admin(request)
        with audited("agent_shown", operator) as facts:
            agent = await self._agents.load(request.path_params["agent_id"])
            facts["agent"] = agent.id
        return answer(view(agent))

    async def put(self, request: Request) -> Response:
        """PUT /api/agents/{agent_id}"""
        operator = self._gatekeeper.require_admin(request)
        definition = await read_body(request, self._decoder, self._bounds)
        for name in definition.__struct_fields__:
            check_text(getattr(definition, name), name)
        self._graphs.check(definition)
        reference = request.path_params["agent_id"]
        agent, created = await put_audited(self._agents, reference, definition, operator)
        return answer(view(agent), 201 if created else 200)

    async def delete(self, request: Request) -> Response:
        """DELETE /api/agents/{agent_id}"""
        operator = self._gatekeeper.require_admin(request)
        with audited("agent_deleted", operator) as facts:
            facts["agent"] = (await self._agents.delete(request.path_params["agent_id"])).id
        return Response(status_code=204)


async def put_audited(agents: Agents, reference: str, definition: AgentDefinition, operator: Operator) -> tuple[Agent, bool]:
    """`Agents.put` by an operator: the audit line names the fields that are new, never what is in them."""
    with audited("agent_put", operator) as facts:
        old = await agents.find_stored(reference)
        facts["fields"] = changed(old.definition if old else None, definition)
        agent, created = await agents.put(reference, definition)
        facts |= {"agent": agent.id, "created": created}
    return agent, created
