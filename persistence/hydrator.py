"""Brings a session from Postgres back into Redis: the one case in which the chat path reads Postgres."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

from persistence.errors import RedisUnavailable
from persistence.model.agents import AgentDefinition
from persistence.model.ids import masked
from persistence.postgres.postgres import Postgres, Transaction
from persistence.redis.agent_copies import AgentCopies
from persistence.redis.outcomes import Absent
from persistence.redis.sessions import SessionStore

Outcome = TypeVar("Outcome")

ATTEMPTS = 5

_DEFAULT = AgentDefinition(graph="echo")


class Hydrator:
    """Reads from Postgres, or within one of its transactions; installs in Redis under the ticket given before that."""

    def __init__(self, store: SessionStore, postgres: Postgres | Transaction, agents: AgentCopies) -> None:
        self._store = store
        self._postgres = postgres
        self._agents = agents

    async def hydrate(self, session_id: str, ticket: int) -> bool:
        """Whether Postgres has the session. It is in Redis then, unless the ticket has gone stale: the caller asks again.

        Raises PostgresUnavailable.
        """
        header = await self._postgres.find_session(session_id)
        if header is None:
            return False
        agent = await self._agents.find(header.agent_id)
        definition = agent.definition if agent else _DEFAULT
        snapshot = await self._postgres.find_snapshot(session_id, definition.policy.hot_turns)
        if snapshot is None:
            return False
        await self._store.hydrate(snapshot, ticket, definition.hot_ttl_s)
        return True

    async def with_session(
        self,
        session_id: str,
        operation: Callable[[], Awaitable[Outcome | Absent]],
        create: Callable[[int], Awaitable[object]] | None = None,
    ) -> Outcome | None:
        """Runs an operation of the Redis layer on a session, which is hydrated as often as it has left Redis.

        A session that is in neither store is made by `create`, which is given the ticket; without it the outcome is None.
        Raises RedisUnavailable when the session leaves Redis again and again, and PostgresUnavailable.
        """
        for _ in range(ATTEMPTS):
            outcome = await operation()
            if not isinstance(outcome, Absent):
                return outcome
            if await self.hydrate(session_id, outcome.ticket):
                continue
            if create is None:
                return None
            await create(outcome.ticket)
        raise RedisUnavailable(f"session {masked(session_id)} left Redis {ATTEMPTS} times while it was wanted")
