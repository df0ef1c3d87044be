"""`/api/agents`: agent definitions, for operators."""

from collections.abc import Sequence
from typing import Annotated

import msgspec
from msgspec import Meta
from starlette.requests import Request
from starlette.responses import Response

from gateway.access.audit import Operator, audited, changed
from gateway.access.gatekeeper import Gatekeeper
from gateway.access.tokens import fingerprint
from gateway.agents import Agents
from gateway.api.answers import answer
from gateway.api.endpoint import ADMIN_ERRORS, BODY_ERRORS, Endpoint
from gateway.api.reading import BodyBounds, check_text, read_body
from gateway.graphs.graphs import Graphs
from persistence.model.agents import Agent, AgentDefinition


class AgentAnswer(AgentDefinition, frozen=True, forbid_unknown_fields=False, kw_only=True):
    """An agent: its UUID, its name, its definition."""

    id: Annotated[str, Meta(description="The agent's UUID, which stays when the agent is renamed")]
    name: Annotated[str, Meta(description="The agent's unique name")]


class AgentList(msgspec.Struct):
    """Every agent, by name."""

    agents: Annotated[list[AgentAnswer], Meta(description="The agents, by name")]


def view(agent: Agent) -> AgentAnswer:
    """An agent as operators see it: fingerprints in place of site keys."""
    shown = msgspec.structs.asdict(agent.definition)
    shown["site_keys"] = tuple(map(fingerprint, agent.definition.site_keys))
    return AgentAnswer(id=agent.id, name=agent.name, **shown)


class AgentsApi:
    """The calls about agents."""

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

    def endpoints(self) -> Sequence[Endpoint]:
        """The calls about agents."""
        return [
            Endpoint("GET", "/api/agents", self.list, "List agents", {200: AgentList}, ADMIN_ERRORS, guard="admin"),
            Endpoint(
                "GET",
                "/api/agents/{agent_id}",
                self.show,
                "Show an agent",
                {200: AgentAnswer},
                (*ADMIN_ERRORS, 404),
                guard="admin",
            ),
            Endpoint(
                "PUT",
                "/api/agents/{agent_id}",
                self.put,
                "Create an agent, or replace its definition",
                {201: AgentAnswer, 200: AgentAnswer},
                (*BODY_ERRORS, *ADMIN_ERRORS, 404, 409),
                description=(
                    "Fields that are left out get their defaults. A name that is not taken creates an agent (201); a UUID "
                    "never does. All pods know of it within 5 seconds."
                ),
                body=AgentDefinition,
                guard="admin",
            ),
            Endpoint(
                "DELETE",
                "/api/agents/{agent_id}",
                self.delete,
                "Delete an agent",
                {204: None},
                (*ADMIN_ERRORS, 404),
                description="Its sessions stay until they are erased.",
                guard="admin",
            ),
        ]


async def put_audited(agents: Agents, reference: str, definition: AgentDefinition, operator: Operator) -> tuple[Agent, bool]:
    """`Agents.put` by an operator. The audit line names the changed fields, never their values."""
    with audited("agent_put", operator) as facts:
        old = await agents.find_stored(reference)
        facts["fields"] = changed(old.definition if old else None, definition)
        agent, created = await agents.put(reference, definition)
        facts |= {"agent": agent.id, "created": created}
    return agent, created
