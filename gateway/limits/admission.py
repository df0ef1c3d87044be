"""A call that the limits have let in: what it was charged, and the place among its agent's running turns that it holds.

The limiter makes an admission; whoever runs the call closes it with its outcome, exactly once.
"""

from time import monotonic
from typing import Literal

from gateway.limits.buckets import AgentUsage, network, rate_headers, remaining_of
from gateway.limits.ledger import Charge, Ledger
from gateway.limits.refusals import Mode, Refusals, rate_limited
from gateway.problems import AgentBusy, Problem, RateLimited
from persistence.model.agents import Agent, RateLimit

Outcome = Literal["ran", "repeated", "refused"]
"""What became of a call: it ran, its answer was given before, or it was refused."""


class Admission:
    """One call. `agent` is None for a call that opens a session and runs no turn; `address` and `sessions` are the limits of
    a client address, `charges` those of its buckets that were charged, by name."""

    def __init__(
        self,
        ledger: Ledger,
        refusals: Refusals,
        ip_address: str,
        agent: Agent | None,
        *,
        address: RateLimit | None,
        sessions: RateLimit | None,
    ) -> None:
        self.charges: dict[str, Charge] = {}
        self._ledger = ledger
        self._refusals = refusals
        self._ip_address = ip_address
        self._agent = agent
        self._address_limit = address
        self._sessions_limit = sessions
        self._day_ends_s: float | None = None
        self._usage: AgentUsage | None = None
        self._runs = False
        self._counted = False
        self._session_charge: Charge | None = None
        self._session_ahead_ms: int | None = None
        self._closed = False

    @property
    def mode(self) -> Mode:
        """How the session's own limit, which lua/begin judges, is to be applied."""
        return self._refusals.mode

    def charge_day(self) -> None:
        """Counts the turn as one of its agent's day."""
        usage = self._agent_usage()
        if usage is not None:
            usage.pending_day += 1
            self._day_ends_s = usage.day_ends_s

    def _agent_usage(self) -> AgentUsage | None:
        return self._ledger.usage(self._agent) if self._agent is not None else None

    # ------------------------------------------------------------------------------------------------------- its place

    async def hold(self) -> None:
        """Takes a place among the agent's running turns, to ask for the session with. Raises AgentBusy.

        While turns that ask for their session have the last places it waits: one of them may give its place back.
        """
        usage = self._agent_usage()
        if self._agent is None or usage is None or self._usage is not None:
            return
        if self.mode == "enforce":
            while True:
                check_running(self._refusals, self._agent, usage)
                if _has_place(self._agent, usage):
                    break
                await usage.answered.wait()
        elif not self._counted:
            check_running(self._refusals, self._agent, usage)
        self._counted = True
        usage.asking += 1
        self._usage = usage

    def let_go(self) -> None:
        """Gives the place back."""
        if self._usage is not None:
            if self._runs:
                self._usage.running -= 1
            else:
                self._usage.asked()
        self._usage, self._runs = None, False

    def began(self, session_ahead_ms: int) -> None:
        """The turn runs; its session's own limit is charged for so many milliseconds beyond now."""
        if self._usage is not None:
            self._runs = True
            self._usage.began()
        limit = self._agent.definition.rate_limit if self._agent is not None else None
        if limit is not None and self.mode != "off":
            self._session_ahead_ms = session_ahead_ms
            if session_ahead_ms > limit.per_s * 1000:
                self._refusals.count("session")

    def limited(self, wait_s: float) -> Problem:
        """Counts a refusal by the session's own limit; the problem for the client."""
        limit = self._agent.definition.rate_limit if self._agent is not None else None
        self._refusals.count("session")
        return rate_limited("session", limit or RateLimit(1, 1), wait_s)

    # ------------------------------------------------------------------------------------------------- its new session

    def reserve_session(self) -> None:
        """Charges the address for a session that is about to be created. Raises RateLimited."""
        limit = self._sessions_limit
        if self._session_charge is not None or self.mode == "off" or limit is None:
            return
        now, key = monotonic(), address_key("sessions", self._ip_address)
        bucket = self._ledger.bucket(key, limit)
        if self._refusals.has_room("sessions", bucket, limit, now):
            self._session_charge = self._ledger.charge(key, bucket, now)

    def session_created(self, created: bool) -> None:
        """Keeps that charge, or refunds it when the session was there already."""
        if self._session_charge is not None and not created:
            self._ledger.refund(self._session_charge)
        self._session_charge = None

    # --------------------------------------------------------------------------------------------------------- its end

    def close(self, outcome: Outcome) -> None:
        """Ends the call: a refused one costs nothing, a repeated one its address alone. Closing twice is harmless."""
        self.let_go()
        self.session_created(False)
        if self._closed:
            return
        self._closed = True
        if outcome == "ran":
            return
        for name, charge in self.charges.items():
            if outcome == "refused" or name != "address":
                self._ledger.refund(charge)
        usage = self._agent_usage()
        if usage is not None and self._day_ends_s is not None and usage.is_today(self._day_ends_s):
            usage.pending_day -= 1

    def headers(self) -> dict[str, str]:
        """RateLimit and RateLimit-Policy: what the client has left of its own limits, and nothing about others."""
        shown = []
        if "address" in self.charges and self._address_limit is not None:
            ahead_s = self._ledger.ahead_s(self.charges["address"].key)
            shown.append(("address", self._address_limit, remaining_of(self._address_limit, ahead_s), ahead_s))
        limit = self._agent.definition.rate_limit if self._agent is not None else None
        if limit is not None and self._session_ahead_ms is not None:
            ahead_s = self._session_ahead_ms / 1000
            shown.append(("session", limit, remaining_of(limit, ahead_s), ahead_s))
        return rate_headers(shown)


class Unlimited:
    """The admission of a call that only its session's own limit bounds."""

    mode: Mode = "enforce"

    async def hold(self) -> None:
        """No place is needed."""

    def let_go(self) -> None:
        """No place is held."""

    def began(self, session_ahead_ms: int) -> None:
        """Nothing is counted."""

    def limited(self, wait_s: float) -> Problem:
        """The problem that a refusal by the session's own limit is."""
        return RateLimited("too many messages in this session", retry_after_s=wait_s)

    def reserve_session(self) -> None:
        """Nothing is charged."""

    def session_created(self, created: bool) -> None:
        """Nothing was charged."""

    def close(self, outcome: Outcome) -> None:
        """Nothing was charged."""


def check_running(refusals: Refusals, agent: Agent, usage: AgentUsage) -> None:
    """Refuses a turn beyond those that may run at a time. Raises AgentBusy."""
    most = agent.definition.max_running_turns
    if most is not None and usage.running + usage.elsewhere(monotonic()) >= most:
        refusals.refuse("running", AgentBusy(retry_after_s=1))


def _has_place(agent: Agent, usage: AgentUsage) -> bool:
    """Whether one more turn may ask for its session."""
    most = agent.definition.max_running_turns
    return most is None or usage.running + usage.asking + usage.elsewhere(monotonic()) < most


def address_key(name: str, ip_address: str) -> str:
    """The key of a client address' bucket for the limit of that name."""
    return f"{name}:{network(ip_address)}"
