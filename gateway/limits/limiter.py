"""Limits over all pods, per client address, agent and website domain: decides at no round trip, from what the ledger knows.

What always holds: a call is charged to all its buckets or, when one of them refuses it, to none; and a charge whose call
came to nothing is refunded. The limit of a session itself is judged by lua/begin.lua, which does the same.
"""

import asyncio
import re
from hashlib import sha256
from time import monotonic

from gateway.limits.admission import Admission, address_key, check_running
from gateway.limits.buckets import DAY_S, AgentUsage, rate_headers
from gateway.limits.ledger import Ledger
from gateway.limits.refusals import Refusals
from gateway.problems import LimitsUnavailable, QuotaExhausted
from persistence.model.agents import Agent, RateLimit

Claim = tuple[str, str, RateLimit]
"""A limit by its name, the key of its bucket, and what it allows."""

SYNC_S = 0.2
FAILED_S = 5.0
"""With GATEWAY_LIMIT_FAILURE=refuse: how long syncs may fail before calls are refused."""


class Limiter:
    """The limits of a pod. `address` and `sessions` bound the turns and the new sessions of one client address (None: no
    limit). With `refuse_on_failure` calls are refused when syncs have failed for `failed_s`."""

    def __init__(
        self,
        ledger: Ledger,
        refusals: Refusals,
        *,
        address: RateLimit | None = None,
        sessions: RateLimit | None = None,
        refuse_on_failure: bool = False,
        failed_s: float = FAILED_S,
    ) -> None:
        self._ledger = ledger
        self._refusals = refusals
        self._address_limit = address
        self._sessions_limit = sessions
        self._refuse_on_failure = refuse_on_failure
        self._failed_s = failed_s

    async def run(self) -> None:
        """Keeps the ledger in step until cancelled."""
        while True:
            await asyncio.sleep(SYNC_S)
            await self.sync()

    async def sync(self) -> None:
        """One sync of the ledger, and the log line of what was refused."""
        await self._ledger.sync()
        self._refusals.log()

    # ------------------------------------------------------------------------------------------------------- addresses

    def check_address(self, ip_address: str) -> None:
        """Refuses a call of an address without room, before anything else is done for it. Charges nothing."""
        self._check("address", ip_address)

    def check_misses(self, ip_address: str) -> None:
        """Refuses a call of an address that has asked too often for what is not there. Charges nothing."""
        self._check("misses", ip_address)

    def charge_miss(self, ip_address: str) -> None:
        """Charges an address for asking for what is not there: Postgres was read for it. Its limit is that of messages."""
        if self._refusals.mode != "off" and self._address_limit is not None:
            key = address_key("misses", ip_address)
            self._ledger.charge(key, self._ledger.bucket(key, self._address_limit), monotonic())

    def _check(self, name: str, ip_address: str) -> None:
        if self._refusals.mode != "enforce" or self._address_limit is None:
            return
        bucket = self._ledger.find(address_key(name, ip_address))
        if bucket is not None:
            self._refusals.has_room(name, bucket, self._address_limit, monotonic())

    # ------------------------------------------------------------------------------------------------------- admission

    async def prepare(self, agent: Agent) -> None:
        """Makes sure that the usage of an agent that limits it is in step before a turn is admitted."""
        definition = agent.definition
        if self._refusals.mode != "off" and (definition.max_running_turns, definition.turns_per_day) != (None, None):
            await self._ledger.request_usage(agent)

    def admit_turn(self, agent: Agent, ip_address: str, website_domain: str) -> Admission:
        """Charges a turn to all its buckets. Raises a Problem, and then has charged none."""
        definition = agent.definition
        claims = self._address_claims(ip_address)
        if definition.domain_rate_limit is not None:
            claims.append(("domain", f"domain:{agent.id}:{_domain_name(website_domain)}", definition.domain_rate_limit))
        if definition.agent_rate_limit is not None:
            claims.append(("agent", f"agent:{agent.id}", definition.agent_rate_limit))
        return self._admit(agent, ip_address, claims)

    def admit_open(self, ip_address: str) -> Admission:
        """Charges the address for a call that opens a session or finds it. Raises RateLimited."""
        return self._admit(None, ip_address, self._address_claims(ip_address))

    def _address_claims(self, ip_address: str) -> list[Claim]:
        if self._address_limit is None:
            return []
        return [("address", address_key("address", ip_address), self._address_limit)]

    def _admit(self, agent: Agent | None, ip_address: str, claims: list[Claim]) -> Admission:
        admission = Admission(
            self._ledger, self._refusals, ip_address, agent, address=self._address_limit, sessions=self._sessions_limit
        )
        if self._refusals.mode == "off":
            return admission
        now = monotonic()
        self._require_sync(now)
        with_room = []
        for name, key, limit in claims:
            bucket = self._ledger.bucket(key, limit)
            if self._refusals.has_room(name, bucket, limit, now):
                with_room.append((name, key, bucket))
        usage = self._ledger.usage(agent) if agent is not None else None
        if agent is not None and usage is not None:
            self._check_day(agent, usage, now)
            if self._refusals.mode == "enforce":
                # Checked again when the turn begins; a refusal here costs no task and no log line.
                check_running(self._refusals, agent, usage)
        for name, key, bucket in with_room:
            admission.charges[name] = self._ledger.charge(key, bucket, now)
        admission.charge_day()
        return admission

    def _require_sync(self, now: float) -> None:
        failing_since_s = self._ledger.failing_since_s
        if self._refuse_on_failure and failing_since_s is not None and now - failing_since_s > self._failed_s:
            self._refusals.refuse("unavailable", LimitsUnavailable(retry_after_s=2))

    def _check_day(self, agent: Agent, usage: AgentUsage, now: float) -> None:
        """Refuses a turn beyond those of the day. Raises QuotaExhausted."""
        quota = agent.definition.turns_per_day
        if quota is None:
            return
        usage.begin_day(now)
        if usage.today >= quota:
            left_s = usage.day_ends_s - now
            headers = rate_headers([("day", RateLimit(quota, DAY_S), 0, left_s)])
            self._refusals.refuse("day", QuotaExhausted(retry_after_s=left_s, headers=headers))


def _domain_name(domain: str) -> str:
    """A website domain as part of a key's name; one that a client made up, by its digest."""
    if re.fullmatch(r"[a-z0-9._-]{1,253}", domain):
        return domain
    return f"~{sha256(domain.encode()).hexdigest()[:32]}" if domain else "-"
