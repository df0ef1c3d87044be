"""What a pod knows of agents: each as a store told it last. `Agents` asks here first.

What always holds: what is known is at most FRESH_S old while Redis answers; one call at a time asks about an agent, and no
other waits for it longer than PATIENCE_S; while Redis cannot be reached an agent stays as it was known last.
"""

import asyncio
from collections.abc import Awaitable, Callable
from typing import NamedTuple

import structlog

from persistence.errors import RedisUnavailable
from persistence.model.agents import Agent
from persistence.tasks import retrieve

log = structlog.get_logger()

FRESH_S = 2.0
"""How long nobody is asked about an agent: after an answer, and after a failure."""
PATIENCE_S = 0.25
"""How long calls wait for news of an agent that is known. A shard that hangs would hold each for 1.8 s."""
STALE_LOGGED_S = 10.0
REMEMBERED = 10_000

LookUp = Callable[[str], Awaitable[Agent | None]]
"""Asks the stores about an agent. Raises RedisUnavailable when what is known has to do."""


class Known(NamedTuple):
    """An agent (None: there is none) as of `told_s`, not asked for again before `due_s`; both on the definitions' clock."""

    agent: Agent | None
    told_s: float
    due_s: float


class Definitions:
    """Agents by UUID or name."""

    def __init__(self, look_up: LookUp, clock: Callable[[], float]) -> None:
        self._look_up = look_up
        self._clock = clock
        # The least recently asked for first.
        self._known: dict[str, Known] = {}
        self._asking: dict[str, tuple[float, asyncio.Task[Agent | None]]] = {}
        self._logged: dict[str, float] = {}

    def known(self, reference: str) -> Agent | None:
        """The agent as a store told it last, whatever its age; asks nobody."""
        found = self._known.get(reference)
        return found.agent if found else None

    async def find(self, reference: str) -> Agent | None:
        """The agent as of at most FRESH_S ago, or as it is known while Redis cannot be reached. Raises what `look_up`
        raises."""
        known = self._known.get(reference)
        now = self._clock()
        if known is not None and now <= known.due_s:
            return known.agent
        if reference not in self._asking:
            task = asyncio.create_task(self._ask(reference, known))
            task.add_done_callback(retrieve)
            self._asking[reference] = now, task
        began_s, asking = self._asking[reference]
        if known is None or known.agent is None:
            # Shielded: others may wait for the same answer.
            return await asyncio.shield(asking)
        await asyncio.wait({asking}, timeout=max(began_s + PATIENCE_S - now, 0))
        return asking.result() if asking.done() else known.agent

    def clear(self) -> None:
        """Forgets everything, and what calls that are under way will find."""
        self._known.clear()
        self._asking.clear()

    async def _ask(self, reference: str, known: Known | None) -> Agent | None:
        asked_s = self._clock()
        try:
            agent = await self._look_up(reference)
            if self._is_current(reference):
                self._remember(reference, Known(agent, asked_s, asked_s + FRESH_S))
            return agent
        except RedisUnavailable as error:
            if known is None or known.agent is None:
                raise
            now = self._clock()
            self._log_stale(known.agent, now - known.told_s, error)
            if self._is_current(reference):
                self._remember(reference, known._replace(due_s=now + FRESH_S))
            return known.agent
        finally:
            if self._is_current(reference):
                del self._asking[reference]

    def _is_current(self, reference: str) -> bool:
        """Whether nothing was cleared since the running task began to ask."""
        asking = self._asking.get(reference)
        return asking is not None and asking[1] is asyncio.current_task()

    def _remember(self, reference: str, known: Known) -> None:
        self._known.pop(reference, None)
        if len(self._known) >= REMEMBERED:
            del self._known[next(iter(self._known))]
        self._known[reference] = known

    def _log_stale(self, agent: Agent, age_s: float, error: RedisUnavailable) -> None:
        now = self._clock()
        if now - self._logged.get(agent.id, -STALE_LOGGED_S) < STALE_LOGGED_S:
            return
        if len(self._logged) >= REMEMBERED:
            self._logged.clear()
        self._logged[agent.id] = now
        log.warning("agents.stale", agent=agent.name, age_s=round(age_s, 1), error=str(error))
