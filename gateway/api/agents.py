"""`/api/agents`: agent definitions, for operators."""

from collections.abc import Sequence
from typing import Annotated, Any, Union, get_args

import msgspec
from msgspec import UNSET, Meta, UnsetType
from starlette.requests import Request
from starlette.responses import Response

from gateway.access.audit import audited
from gateway.access.gatekeeper import Gatekeeper
from gateway.agents import Agents, Document, document_of, merge_patch
from gateway.api.answers import answer
from gateway.api.endpoint import ADMIN_ERRORS, BODY_ERRORS, Endpoint
from gateway.api.reading import JSON, MERGE_PATCH, BodyBounds, check_text, read_body
from gateway.graphs.graphs import Graphs
from gateway.problems import AgentNotFound
from persistence.model.agents import Agent, AgentDefinition, RateLimit, null_parts


class AgentAnswer(AgentDefinition, frozen=True, forbid_unknown_fields=False, kw_only=True):
    """An agent: its UUID, its name, its definition; of its site keys the fingerprints."""

    id: Annotated[str, Meta(description="The agent's UUID, which stays when the agent is renamed")]
    name: Annotated[str, Meta(description="The agent's unique name")]


class AgentList(msgspec.Struct):
    """Every agent, by name."""

    agents: Annotated[list[AgentAnswer], Meta(description="The agents, by name")]


class AgentBody(AgentDefinition, frozen=True, kw_only=True):
    """An agent's definition. `id` and `name` may be left in what `GET` showed: they are the agent's own."""

    id: Annotated[str | UnsetType, Meta(description="The agent's UUID")] = UNSET
    name: Annotated[str | UnsetType, Meta(description="The agent's name")] = UNSET


def _patch_of(kind: type[msgspec.Struct], name: str, doc: str, replaced: dict[Any, Any], base: type[msgspec.Struct]) -> Any:
    """A type like `kind` for describing its patches: every field may be missing, or null."""
    fields: list[tuple[str, Any, Any]] = []
    for field in msgspec.structs.fields(kind):
        parts = [replaced.get(part, part) for part in null_parts(field.type) or [field.type]]
        described = Meta(description=_description_of(field.type))
        fields.append((field.name, Annotated[Union[*parts, UnsetType, None], described], UNSET))
    return msgspec.defstruct(
        name,
        fields,
        bases=(base,),
        frozen=True,
        kw_only=True,
        forbid_unknown_fields=True,
        namespace={"__doc__": " ".join(doc.split())},
    )


def _description_of(annotated: Any) -> str:
    """The sentence of a field's type."""
    return next(part.description for part in get_args(annotated) if isinstance(part, Meta) and part.description)


RateLimitPatch = _patch_of(RateLimit, "RateLimitPatch", "What is new in a rate limit.", {}, msgspec.Struct)
AgentPatch = _patch_of(
    AgentDefinition,
    "AgentPatch",
    """What is new in an agent, as a JSON merge patch (RFC 7396): fields that are left out stay, objects merge, lists are
    replaced. `null` sets a limit or `retention_days` to none and any other field to its default; inside an object it removes
    the member.""",
    {RateLimit: RateLimitPatch},
    AgentBody,
)


def view(agent: Agent) -> AgentAnswer:
    """An agent as operators see it: fingerprints in place of site keys."""
    return msgspec.convert(document_of(agent), AgentAnswer)


class AgentsApi:
    """The calls about agents."""

    def __init__(self, agents: Agents, graphs: Graphs, gatekeeper: Gatekeeper, *, bounds: BodyBounds) -> None:
        self._agents = agents
        self._graphs = graphs
        self._gatekeeper = gatekeeper
        self._bounds = bounds
        self._decoder = msgspec.json.Decoder(Document)

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
        document = await self._read(request, JSON)
        reference = request.path_params["agent_id"]
        written = await self._agents.write(reference, lambda stored: document, operator, check=self._check)
        return answer(view(written.agent), 200 if written.before else 201)

    async def patch(self, request: Request) -> Response:
        """PATCH /api/agents/{agent_id}"""
        operator = self._gatekeeper.require_admin(request)
        patch = await self._read(request, JSON, MERGE_PATCH)

        def patched(stored: Document | None) -> Document:
            if stored is None:
                raise AgentNotFound
            return merge_patch(stored, patch)

        written = await self._agents.write(request.path_params["agent_id"], patched, operator, check=self._check)
        return answer(view(written.agent))

    async def delete(self, request: Request) -> Response:
        """DELETE /api/agents/{agent_id}"""
        operator = self._gatekeeper.require_admin(request)
        await self._agents.delete(request.path_params["agent_id"], operator)
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
                body=AgentBody,
                guard="admin",
            ),
            Endpoint(
                "PATCH",
                "/api/agents/{agent_id}",
                self.patch,
                "Change the fields of an agent that are named",
                {200: AgentAnswer},
                (*BODY_ERRORS, *ADMIN_ERRORS, 404),
                description=(
                    "A JSON merge patch (RFC 7396). Of two patches at the same time neither undoes the other's fields. All "
                    "pods know of it within 5 seconds."
                ),
                body=AgentPatch,
                media_types=(JSON, MERGE_PATCH),
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

    async def _read(self, request: Request, *media_types: str) -> Document:
        document = await read_body(request, self._decoder, self._bounds, media_types)
        for name, value in document.items():
            check_text(value, name)
        return document

    def _check(self, definition: AgentDefinition, stored: AgentDefinition | None) -> None:
        """Refuses a graph or config that this server cannot run, unless it is the stored one: an agent whose graph is gone
        can still be switched off."""
        if stored is None or (definition.graph, definition.config) != (stored.graph, stored.config):
            self._graphs.check(definition)
