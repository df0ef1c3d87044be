"""The agents that this pod answers for: found by UUID or name, each looked up again after 2 s at most.

Postgres owns the definitions and Redis has a copy; a change is on every pod within seconds, also while Postgres is down.
"""

import re
from collections.abc import Callable, Sequence
from time import monotonic

import msgspec
from uuid_utils import uuid7

from gateway.access.domains import check_allowed_domains
from gateway.access.tokens import fingerprint
from gateway.problems import AgentNotFound, InvalidField, NameTaken
from persistence.errors import DataRefused, PostgresUnavailable
from persistence.model.agents import Agent, AgentDefinition
from persistence.model.ids import as_uuid
from persistence.postgres.postgres import Postgres
from persistence.redis.agent_copies import AgentCopies

FRESH_S = 2.0
REMEMBERED = 10_000


class Agents:
    """Finds, puts and deletes agents."""

    def __init__(self, copies: AgentCopies, postgres: Postgres, *, clock: Callable[[], float] = monotonic) -> None:
        self._copies = copies
        self._postgres = postgres
        self._clock = clock
        self._known: dict[str, tuple[float, Agent | None]] = {}

    async def load(self, reference: str) -> Agent:
        """The agent with this UUID or name. Raises AgentNotFound."""
        now = self._clock()
        known = self._known.get(reference)
        if known is None or now - known[0] > FRESH_S:
            _check_reference(reference)
            known = (now, await self._look_up(reference))
            if len(self._known) >= REMEMBERED:
                self._known.clear()
            self._known[reference] = known
        if known[1] is None:
            raise AgentNotFound
        return known[1]

    async def _look_up(self, reference: str) -> Agent | None:
        agent = await self._copies.find(reference)
        if agent is None:
            try:
                agent = await self._postgres.find_agent(reference)
            except PostgresUnavailable:
                # Redis has every agent that was ever put or looked up: without Postgres, one it does not know is none.
                return None
            if agent is not None:
                await self._copies.put(agent)
        return agent

    def known(self, reference: str) -> Agent | None:
        """The agent as it was looked up last, without asking anybody."""
        found = self._known.get(reference)
        return found[1] if found else None

    async def put(self, reference: str, definition: AgentDefinition) -> tuple[Agent, bool]:
        """Creates the agent of that name, or replaces the definition of the one with that UUID or name.

        Returns the agent and whether it is new.
        """
        if as_uuid(reference) is None:
            check_name(reference)
        old = await self._postgres.find_agent(reference)
        if old is None and as_uuid(reference) is not None:
            raise AgentNotFound("an agent is created under a name, not under a UUID")
        definition = _checked(definition, old.definition.site_keys if old else ())
        agent = Agent(old.id if old else str(uuid7()), old.name if old else reference, definition)
        try:
            await self._postgres.put_agent(agent)
        except DataRefused as error:
            if error.constraint:
                raise NameTaken from error
            raise InvalidField(f"definition: {error}", field="definition") from error
        await self._copies.put(agent)
        self._known.clear()
        return agent, old is None

    async def find_stored(self, reference: str) -> Agent | None:
        """The agent with this UUID or name as Postgres has it now. Raises PostgresUnavailable."""
        try:
            _check_reference(reference)
        except AgentNotFound:
            return None
        return await self._postgres.find_agent(reference)

    async def delete(self, reference: str) -> Agent:
        """Deletes an agent; its sessions stay. Returns what it was. Raises AgentNotFound."""
        _check_reference(reference)
        agent = await self._postgres.find_agent(reference)
        if agent is None:
            raise AgentNotFound
        await self._postgres.delete_agent(agent.id)
        await self._copies.delete(agent)
        self._known.clear()
        return agent

    async def list(self) -> list[Agent]:
        """Every agent, by name."""
        return await self._postgres.list_agents()


def _checked(definition: AgentDefinition, known_keys: Sequence[str]) -> AgentDefinition:
    """The definition with its site keys whole. Raises InvalidField for what can never work."""
    try:
        check_allowed_domains(definition.allowed_domains)
    except ValueError as error:
        raise InvalidField(f"allowed_domains: {error}", field="allowed_domains") from error
    by_fingerprint = {fingerprint(key): key for key in known_keys}
    try:
        keys = tuple(by_fingerprint[key] if key.startswith("sha256:") else key for key in definition.site_keys)
    except KeyError as error:
        raise InvalidField("site_keys: the agent has no key with this fingerprint", field="site_keys") from error
    if len(set(keys)) < len(keys):
        raise InvalidField("site_keys: one is there twice", field="site_keys")
    return msgspec.structs.replace(definition, site_keys=keys)


def check_name(name: str) -> None:
    """Raises InvalidField unless `name` can be an agent's name."""
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,100}", name):
        raise InvalidField("agent_id: a name is 1 to 100 of A-Z a-z 0-9 _ . -", field="agent_id")


def _check_reference(reference: str) -> None:
    """Raises AgentNotFound for what can be neither a UUID nor a name."""
    if as_uuid(reference) is None:
        try:
            check_name(reference)
        except InvalidField as error:
            raise AgentNotFound from error
