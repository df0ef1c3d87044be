"""Hydration: a session comes back from Postgres into Redis, the one case in which the chat path reads Postgres."""

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

HYDRATIONS = 5

_DEFAULT = AgentDefinition(graph="echo")


class Hydrator:
    """Hydrates sessions, under the ticket that Redis gave before Postgres was read: a pod that stalled in between cannot
    install an old session over a newer one. `postgres` may be one of its transactions."""

    def __init__(self, store: SessionStore, postgres: Postgres | Transaction, agents: AgentCopies) -> None:
        self._store = store
        self._postgres = postgres
        self._agents = agents

    async def hydrate(self, session_id: str, ticket: int) -> bool:
        """Whether Postgres has the session. If so it is in Redis now, or the ticket was stale: either way, ask Redis again.

        Raises PostgresUnavailable or RedisUnavailable.
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
        """Runs an operation of the Redis layer on a session, hydrating it whenever the operation finds it absent.

        A session in neither store goes to `create` with the ticket, and then the operation runs again; without `create` the
        outcome is None. Raises PostgresUnavailable, or RedisUnavailable when the session was absent HYDRATIONS times.
        """
        for _ in range(HYDRATIONS):
            outcome = await operation()
            if not isinstance(outcome, Absent):
                return outcome
            if await self.hydrate(session_id, outcome.ticket):
                continue
            if create is None:
                return None
            await create(outcome.ticket)
        raise RedisUnavailable(f"session {masked(session_id)} left Redis {HYDRATIONS} times during one call")
