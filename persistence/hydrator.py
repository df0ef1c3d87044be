"""Hydration: a session comes back from Postgres into Redis, the one case in which the chat path reads Postgres.

Also a session that Redis has as of an older epoch, which may lack what Postgres knows: it is compared, and replaced if so.
"""

import asyncio
from collections.abc import Awaitable, Callable
from enum import Enum
from time import monotonic
from typing import Protocol, TypeVar

import structlog

from persistence.errors import PostgresUnavailable, RedisUnavailable
from persistence.model.agents import Agent, AgentDefinition
from persistence.model.ids import as_uuid, masked
from persistence.postgres.postgres import Postgres, Transaction
from persistence.redis.outcomes import Absent, Reconciled
from persistence.redis.sessions import SessionStore

log = structlog.get_logger()

Outcome = TypeVar("Outcome")

HYDRATIONS = 5
WAIT_S = 2.0
"""How long a session waits for its records on the outbox, when Postgres knows something else of it."""
LOOK_AGAIN_S = 0.05

_DEFAULT = AgentDefinition(graph="echo")


class Hydrated(Enum):
    """What became of a session that was absent: ask Redis again; Postgres has none; its records have to be flushed first."""

    ASK_AGAIN = "ask again"
    NOWHERE = "nowhere"
    WAITING = "waiting"


class FindsAgents(Protocol):
    """Finds definitions: a pod's also while the shard with the copy is away."""

    async def find(self, reference: str) -> Agent | None: ...


class Hydrator:
    """Hydrates sessions, under the ticket that Redis gave before Postgres was read: a pod that stalled in between cannot
    install an old session over a newer one. `postgres` may be one of its transactions."""

    def __init__(self, store: SessionStore, postgres: Postgres | Transaction, agents: FindsAgents) -> None:
        self._store = store
        self._postgres = postgres
        self._agents = agents

    async def hydrate(self, session_id: str, absent: Absent, *, patient: bool = True) -> Hydrated:
        """Brings what Postgres has of a session into Redis, if that has less.

        One that Redis has is left as it is while Postgres is down, or if it cannot wait any more (not `patient`); it is
        looked at again in the next epoch. Raises PostgresUnavailable, RedisUnavailable or Damaged.
        """
        if not absent.held:
            return await self._install(session_id, absent.ticket)
        try:
            if as_uuid(absent.held) and await self._postgres.erased_ids([absent.held]):
                if await self._store.erase_again(session_id, absent.held):
                    log.warning("session.erased_again", session=masked(session_id))
                return Hydrated.ASK_AGAIN
            header = await self._postgres.find_session(session_id)
        except PostgresUnavailable as error:
            log.warning("session.not_reconciled", session=masked(session_id), error=str(error))
            await self._store.reconcile(session_id, absent.ticket, None, vouched=True)
            return Hydrated.ASK_AGAIN
        outcome = await self._store.reconcile(session_id, absent.ticket, header)
        if outcome is Reconciled.WAITING:
            if patient:
                return Hydrated.WAITING
            log.warning("session.not_reconciled", session=masked(session_id), error="its records wait for the worker")
            await self._store.reconcile(session_id, absent.ticket, None, vouched=True)
        if outcome is Reconciled.BEHIND:
            log.warning("session.forgotten", session=masked(session_id))
            return await self._install(session_id, absent.ticket)
        return Hydrated.ASK_AGAIN

    async def _install(self, session_id: str, ticket: int) -> Hydrated:
        header = await self._postgres.find_session(session_id)
        if header is None:
            return Hydrated.NOWHERE
        agent = await self._agents.find(header.agent_id)
        definition = agent.definition if agent else _DEFAULT
        snapshot = await self._postgres.find_snapshot(session_id, definition.policy.hot_turns)
        if snapshot is None:
            return Hydrated.NOWHERE
        await self._store.hydrate(snapshot, ticket, definition.hot_ttl_s)
        return Hydrated.ASK_AGAIN

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
        deadline_s = 0.0
        hydrations = 0
        while hydrations < HYDRATIONS:
            outcome = await operation()
            if not isinstance(outcome, Absent):
                return outcome
            deadline_s = deadline_s or monotonic() + WAIT_S
            hydrated = await self.hydrate(session_id, outcome, patient=monotonic() < deadline_s)
            if hydrated is Hydrated.WAITING:
                await asyncio.sleep(LOOK_AGAIN_S)
                continue
            hydrations += 1
            if hydrated is Hydrated.NOWHERE:
                if create is None:
                    return None
                await create(outcome.ticket)
        raise RedisUnavailable(f"session {masked(session_id)} left Redis {HYDRATIONS} times during one call")
