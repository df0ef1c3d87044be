"""Copies of agent definitions in Redis. Postgres owns them; a pod that has no copy loads it from there."""

import msgspec

from persistence.errors import Damaged
from persistence.model.agents import Agent, decode_definition
from persistence.model.ids import as_uuid
from persistence.redis.keys import Keys
from persistence.redis.scripts import Scripts


class AgentCopies:
    """The copies in Redis: a hash under the agent's id, and under its name a hash that points at the id."""

    def __init__(self, scripts: Scripts, keys: Keys) -> None:
        self._scripts = scripts
        self._keys = keys

    async def find(self, reference: str) -> Agent | None:
        """The agent by UUID or name; None when Redis has no copy. Raises Damaged."""
        agent_id = as_uuid(reference)
        if agent_id is None:
            pointer = await self._hash(reference)
            if not pointer:
                return None
            agent_id = as_uuid(pointer.get(b"id", b"").decode(errors="replace"))
            if agent_id is None:
                raise Damaged(self._keys.agent(reference), "id", "is missing or no UUID")
        fields = await self._hash(agent_id)
        if not fields:
            return None
        where = self._keys.agent(agent_id)
        for field in (b"name", b"definition"):
            if field not in fields:
                raise Damaged(where, field.decode(), "is missing")
        try:
            name, raw = fields[b"name"].decode(), fields[b"definition"]
        except UnicodeDecodeError as error:
            raise Damaged(where, "name", "is unreadable") from error
        if fields.get(b"id") != agent_id.encode():
            raise Damaged(where, "id", "is another agent's")
        if as_uuid(reference) is None and name != reference:
            return None
        return Agent(agent_id, name, decode_definition(raw, where))

    async def put(self, agent: Agent, old_name: str | None = None) -> None:
        """Writes the copy; the pointer under `old_name` goes."""
        fields = ("id", agent.id, "name", agent.name, "definition", msgspec.json.encode(agent.definition))
        await self._scripts.command("HSET", self._keys.agent(agent.id), *fields)
        await self._scripts.command("HSET", self._keys.agent(agent.name), "id", agent.id)
        if old_name and old_name != agent.name:
            await self._scripts.command("DEL", self._keys.agent(old_name))

    async def delete(self, agent: Agent) -> None:
        """Removes the copy and its pointer."""
        await self._scripts.command("DEL", self._keys.agent(agent.id))
        await self._scripts.command("DEL", self._keys.agent(agent.name))

    async def _hash(self, reference: str) -> dict[bytes, bytes]:
        found: list[bytes] = await self._scripts.command("HGETALL", self._keys.agent(reference))
        return dict(zip(found[::2], found[1::2], strict=True))
