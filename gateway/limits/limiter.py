"""Limits that no session has by itself: per client address, agent and website domain, over all pods and at no round trip.

Each pod decides by what it knows and tells Redis in the background, five times a second and all at once, what it has let
through; what it learns is what all pods have. So a limit can be overrun by what pods let through in that time. If Redis
cannot be reached each pod goes on with what it knows, or refuses after some seconds if it is set to.

What always holds: a call is charged to all its buckets or, when one refuses it, to none; and what was charged for a call
that no turn came of is given back. The limit of a session itself is judged by lua/begin.lua, which does the same.
"""

import asyncio
import re
from collections import Counter, OrderedDict
from collections.abc import Mapping
from hashlib import sha256
from secrets import token_hex
from time import monotonic
from typing import Literal

import structlog

from gateway.limits.buckets import DAY_S, RUNNING_LIFE_MS, Bounds, Bucket, left_of, network, rate_headers
from gateway.metrics import Metrics
from gateway.problems import AgentBusy, LimitsUnavailable, Problem, QuotaExhausted, RateLimited, TooManyStreams
from persistence.errors import PersistenceError
from persistence.model.agents import Agent, RateLimit
from persistence.redis.shared_limits import DayUpdate, LimitUpdate, RateUpdate, RunningUpdate, SharedLimits, SharedValue
from persistence.tasks import retrieve

log = structlog.get_logger()

Mode = Literal["enforce", "shadow", "off"]
Claim = tuple[str, str, RateLimit]
"""A limit by its name, the key of its bucket, and what it allows."""

SYNC_S = 0.2
LOG_S = 1.0
FAILED_S = 5.0
"""With GATEWAY_LIMIT_FAILURE=refuse: for how long Redis may be away before calls are refused."""
REMEMBERED = 50_000
"""Buckets that a pod remembers, some 300 bytes each."""
LOOKED_AT = 2_000
"""Buckets that one step looks at for whether they can be forgotten."""
SECOND_CHANCES = 8
MET_S = 60.0
"""For how long a pod keeps in step with an agent's bounds when nobody asks for it."""


class Limiter:
    """The limits of a pod. `address` and `sessions` bound the turns and the new sessions of one client address."""

    def __init__(
        self,
        limits: SharedLimits,
        metrics: Metrics,
        *,
        mode: Mode = "enforce",
        address: RateLimit | None = None,
        sessions: RateLimit | None = None,
        refuse_on_failure: bool = False,
    ) -> None:
        self.mode = mode
        self.address_limit = address
        self.session_limit = sessions
        self._limits = limits
        self._metrics = metrics
        self._refuse_on_failure = refuse_on_failure
        self._pod = token_hex(8)
        # Those charged last are at the end: who leaves first is who has not been heard of for longest.
        self._buckets: OrderedDict[str, Bucket] = OrderedDict()
        self._untold: set[str] = set()
        self._to_look_at: list[str] = []
        self._bounds: dict[str, Bounds] = {}
        self._failing_since: float | None = None
        self._refused: Counter[str] = Counter()
        self._logged_s = 0.0

    # ------------------------------------------------------------------------------------------------------- admission

    def check_address(self, ip_address: str) -> None:
        """Refuses a call of an address that has no room, before anything else is done for it. Charges nothing."""
        self._check("address", ip_address)

    def check_misses(self, ip_address: str) -> None:
        """Refuses a call of an address that has asked too often for what is not there, before it is looked up once more."""
        self._check("misses", ip_address)

    def charge_miss(self, ip_address: str) -> None:
        """Charges an address for asking for what is not there: Postgres had to be looked into. As often as it may talk."""
        if self.mode != "off" and self.address_limit is not None:
            key = _of_address("misses", ip_address)
            self._charge(key, self._bucket(key, self.address_limit), monotonic())

    def _check(self, name: str, ip_address: str) -> None:
        if self.mode != "enforce" or self.address_limit is None:
            return
        bucket = self._buckets.get(_of_address(name, ip_address))
        if bucket is not None:
            self._has_room(name, bucket, self.address_limit, monotonic())

    async def meet(self, agent: Agent) -> None:
        """Learns of an agent's bounds what all pods have, if this pod has not been asked for it lately."""
        definition = agent.definition
        if self.mode == "off" or (definition.max_running_turns is None and definition.turns_per_day is None):
            return
        bounds = self._bounds.get(agent.id)
        if bounds is None:
            bounds = self._bounds[agent.id] = Bounds()
            bounds.meeting = asyncio.create_task(self._step({}, {agent.id: bounds}))
            bounds.meeting.add_done_callback(retrieve)
        bounds.asked_s = monotonic()
        if bounds.meeting is not None:
            await asyncio.wait({bounds.meeting})
            bounds.meeting = None

    def admit_turn(self, agent: Agent, ip_address: str, website_domain: str) -> "Admission":
        """Charges a turn to all its buckets. Raises a Problem, and then has charged none."""
        definition = agent.definition
        claims = self._claims_of(ip_address)
        if definition.domain_rate_limit is not None:
            claims.append(("domain", f"domain:{agent.id}:{_domain_name(website_domain)}", definition.domain_rate_limit))
        if definition.agent_rate_limit is not None:
            claims.append(("agent", f"agent:{agent.id}", definition.agent_rate_limit))
        return self._admit(Admission(self, ip_address, agent), claims)

    def admit_open(self, ip_address: str) -> "Admission":
        """Charges the address for opening a session, which it may find. Raises RateLimited."""
        return self._admit(Admission(self, ip_address, None), self._claims_of(ip_address))

    def _claims_of(self, ip_address: str) -> list[Claim]:
        """What any call is charged to: its address."""
        if self.address_limit is None:
            return []
        return [("address", _of_address("address", ip_address), self.address_limit)]

    def _admit(self, admission: "Admission", claims: list[Claim]) -> "Admission":
        if self.mode == "off":
            return admission
        now = monotonic()
        self._require_redis(now)
        charged = []
        for name, key, limit in claims:
            bucket = self._bucket(key, limit)
            if self._has_room(name, bucket, limit, now):
                charged.append((name, key, bucket))
        if admission.agent is not None:
            self._check_quota(admission.agent, now)
            if self.mode == "enforce":
                # Looked at again when the turn begins; here it costs no task and no line of the log.
                self.check_running(admission.agent, now)
        for name, key, bucket in charged:
            self._charge(key, bucket, now)
            admission.charged[name] = (key, bucket, now)
        if admission.agent is not None:
            admission.charge_day(now)
        return admission

    def _has_room(self, name: str, bucket: Bucket, limit: RateLimit, now: float) -> bool:
        """Whether a bucket has room for a turn. Raises RateLimited when it has none, unless that is only to be counted."""
        wait_s = bucket.wait_s(now)
        if wait_s > 1e-6:
            self._refuse(name, _rate_limited(name, limit, wait_s))
            return False
        return True

    def _bucket(self, key: str, limit: RateLimit) -> Bucket:
        """The bucket of that name, remembered from now on."""
        bucket = self._buckets.get(key)
        if bucket is None:
            if len(self._buckets) >= REMEMBERED:
                self._forget_one()
            bucket = self._buckets[key] = Bucket(limit)
        else:
            bucket.set(limit)
        return bucket

    def _forget_one(self) -> None:
        """Makes room in a flood of addresses: who has not called for longest is forgotten, and learned anew from Redis if it
        calls again. Who has used up half of its limit is passed over, for a while."""
        now = monotonic()
        for _ in range(SECOND_CHANCES):
            key = next(iter(self._buckets))
            bucket = self._buckets[key]
            if bucket.tat_s - now < bucket.per_s / 2:
                break
            self._buckets.move_to_end(key)
        key, _ = self._buckets.popitem(last=False)
        self._untold.discard(key)

    def _charge(self, key: str, bucket: Bucket, now: float) -> None:
        bucket.charge(now)
        if key in self._buckets:
            self._buckets.move_to_end(key)
            self._untold.add(key)

    def give_back(self, key: str, bucket: Bucket, charged_s: float) -> None:
        """Undoes a charge."""
        bucket.give_back(charged_s)
        if self._buckets.get(key) is bucket:
            self._untold.add(key)

    def reserve(self, ip_address: str) -> tuple[str, Bucket, float] | None:
        """Charges an address for a session that it is about to create. Raises RateLimited."""
        if self.mode == "off" or self.session_limit is None:
            return None
        now = monotonic()
        key = _of_address("sessions", ip_address)
        bucket = self._bucket(key, self.session_limit)
        if not self._has_room("sessions", bucket, self.session_limit, now):
            return None
        self._charge(key, bucket, now)
        return key, bucket, now

    def _check_quota(self, agent: Agent, now: float) -> None:
        """Refuses a turn beyond those of today. Raises QuotaExhausted."""
        quota, bounds = agent.definition.turns_per_day, self._bounds.get(agent.id)
        if quota is None or bounds is None:
            return
        bounds.turn_day(now)
        if bounds.today >= quota:
            left_s = bounds.day_ends_s - now
            headers = rate_headers([("day", RateLimit(quota, DAY_S), 0, left_s)])
            self._refuse("day", QuotaExhausted(retry_after_s=left_s, headers=headers))

    def check_running(self, agent: Agent, now: float) -> None:
        """Refuses a turn beyond those that may run at a time. Raises AgentBusy."""
        bound, bounds = agent.definition.max_running_turns, self._bounds.get(agent.id)
        if bound is not None and bounds is not None and bounds.running + bounds.elsewhere(now) >= bound:
            self._refuse("running", AgentBusy(retry_after_s=1))

    def has_place(self, agent: Agent, bounds: Bounds) -> bool:
        """Whether one more turn may ask for its session."""
        bound = agent.definition.max_running_turns
        return bound is None or bounds.running + bounds.asking + bounds.elsewhere(monotonic()) < bound

    def bounds(self, agent: Agent) -> Bounds | None:
        """What is known of the agent's bounds, if it has any."""
        return self._bounds.get(agent.id)

    def remaining(self, key: str, limit: RateLimit) -> tuple[int, float]:
        """How many turns a bucket has room for, and the seconds until it is empty again."""
        bucket = self._buckets.get(key)
        ahead_s = max(bucket.tat_s - monotonic(), 0.0) if bucket is not None else 0.0
        return left_of(limit, ahead_s), ahead_s

    def refused_by_session(self, limit: RateLimit, wait_s: float) -> Problem:
        """Counts a refusal by the session's own limit; what it is to the client."""
        self.count("session")
        return _rate_limited("session", limit, wait_s)

    def refuse_stream(self, name: str, detail: str) -> None:
        """Refuses a stream, or counts it. Raises TooManyStreams."""
        self._refuse(name, TooManyStreams(detail, retry_after_s=5))

    def _refuse(self, name: str, problem: Problem) -> None:
        """Counts a refusal, and raises it unless it is only to be counted."""
        self.count(name)
        if self.mode == "enforce":
            raise problem

    def count(self, name: str) -> None:
        """Counts what a limit has refused, or would have."""
        self._metrics.limited.labels(name, self.mode).inc()
        self._refused[name] += 1

    def _require_redis(self, now: float) -> None:
        if self._refuse_on_failure and self._failing_since is not None and now - self._failing_since > FAILED_S:
            self._refuse("unavailable", LimitsUnavailable(retry_after_s=2))

    # ------------------------------------------------------------------------------------------------------- the step

    async def run(self) -> None:
        """Keeps in step with Redis until cancelled."""
        while True:
            await asyncio.sleep(SYNC_S)
            await self.sync()

    async def sync(self) -> None:
        """Tells Redis what was let through; learns what the other pods have; forgets what is empty."""
        now = monotonic()
        untold, self._untold = self._untold, set()
        for agent_id, bounds in list(self._bounds.items()):
            if now - bounds.asked_s > MET_S and not (bounds.running or bounds.asking or bounds.untold_day):
                del self._bounds[agent_id]
        await self._step({key: self._buckets[key] for key in untold if key in self._buckets}, dict(self._bounds))
        self._forget_empty()
        self._log()

    async def _step(self, buckets: Mapping[str, Bucket], bounds: Mapping[str, Bounds]) -> None:
        told: dict[str, LimitUpdate] = {}
        for key, bucket in buckets.items():
            told[key] = RateUpdate(bucket.untold, bucket.interval_s * 1000)
            bucket.untold = 0
        days = {}
        for agent_id, one in bounds.items():
            one.turn_day(monotonic())
            told[f"running:{agent_id}"] = RunningUpdate(self._pod, one.running, RUNNING_LIFE_MS)
            told[f"day:{agent_id}"] = DayUpdate(one.untold_day)
            days[agent_id], one.untold_day = one.untold_day, 0
            one.telling_day += days[agent_id]
        if not told:
            return
        learned, error = await self._limits.sync(told)
        now = monotonic()
        self._note(error, now)
        for key, bucket in buckets.items():
            if key in learned:
                bucket.learn(learned[key].value, now)
            else:
                # Not told: it is part of the next step.
                told_rate = told[key]
                assert isinstance(told_rate, RateUpdate)
                bucket.keep_untold(told_rate.turns, now)
                if self._buckets.get(key) is bucket:
                    self._untold.add(key)
        for agent_id, one in bounds.items():
            self._learn_bounds(one, days[agent_id], learned.get(f"running:{agent_id}"), learned.get(f"day:{agent_id}"), now)

    @staticmethod
    def _learn_bounds(bounds: Bounds, cost: int, running: SharedValue | None, day: SharedValue | None, now: float) -> None:
        if running is not None:
            bounds.others, bounds.learned_s = running.value, now
        bounds.telling_day -= cost
        if day is not None:
            bounds.day, bounds.day_ends_s = day.value, now + day.left_ms / 1000
        else:
            bounds.untold_day += cost

    def _note(self, error: PersistenceError | None, now: float) -> None:
        if error is None:
            self._failing_since = None
            return
        if self._failing_since is None:
            self._failing_since = now
        log.warning("limits.sync_failed", error=str(error))

    def _forget_empty(self) -> None:
        """Looks at some of the buckets, and at all of them in turn: a flood must not make a step a long one."""
        now = monotonic()
        if not self._to_look_at:
            self._to_look_at = list(self._buckets)
        for key in self._to_look_at[-LOOKED_AT:]:
            bucket = self._buckets.get(key)
            if bucket is not None and bucket.tat_s <= now and key not in self._untold:
                del self._buckets[key]
        del self._to_look_at[-LOOKED_AT:]

    def _log(self) -> None:
        """One line a second at most for what was refused: a flood must not become one of the log."""
        now = monotonic()
        if self._refused and now - self._logged_s >= LOG_S:
            log.info("limits.refused", mode=self.mode, **self._refused)
            self._refused.clear()
            self._logged_s = now


class Admission:
    """A call that was let in: what it was charged, and what it holds until it ends."""

    def __init__(self, limiter: Limiter, ip_address: str, agent: Agent | None) -> None:
        self.agent = agent
        self.charged: dict[str, tuple[str, Bucket, float]] = {}
        self._limiter = limiter
        self._ip_address = ip_address
        self._day_ends_s: float | None = None
        self._asked = False
        self._bounds: Bounds | None = None
        self._runs = False
        self._reserved: tuple[str, Bucket, float] | None = None
        self._session_ahead_ms: int | None = None
        self._settled = False

    @property
    def mode(self) -> Mode:
        """How the session's own limit is to be judged."""
        return self._limiter.mode

    def charge_day(self, now: float) -> None:
        """Counts the turn as one of today."""
        bounds = self._limiter.bounds(self.agent) if self.agent is not None else None
        if bounds is not None:
            bounds.untold_day += 1
            self._day_ends_s = bounds.day_ends_s

    async def hold(self) -> None:
        """Takes a place among the agent's running turns, to ask for the session with. Raises AgentBusy.

        While the last places are with turns that ask for theirs, it waits for what comes of them.
        """
        bounds = self._limiter.bounds(self.agent) if self.agent is not None else None
        if self.agent is None or bounds is None or self._bounds is not None:
            return
        if self.mode == "enforce":
            while True:
                self._limiter.check_running(self.agent, monotonic())
                if self._limiter.has_place(self.agent, bounds):
                    break
                await bounds.answered.wait()
        elif not self._asked:
            self._limiter.check_running(self.agent, monotonic())
        self._asked = True
        bounds.asking += 1
        self._bounds = bounds

    def let_go(self) -> None:
        """Gives the place back."""
        if self._bounds is not None:
            if self._runs:
                self._bounds.running -= 1
            else:
                self._answered(self._bounds)
        self._bounds, self._runs = None, False

    @staticmethod
    def _answered(bounds: Bounds) -> None:
        bounds.asking -= 1
        bounds.answered.set()
        bounds.answered = asyncio.Event()

    def began(self, session_ahead_ms: int) -> None:
        """The turn runs; its session's own limit is charged so far."""
        if self._bounds is not None:
            self._bounds.running += 1
            self._runs = True
            self._answered(self._bounds)
        limit = self.agent.definition.rate_limit if self.agent is not None else None
        if limit is not None and self.mode != "off":
            self._session_ahead_ms = session_ahead_ms
            if session_ahead_ms > limit.per_s * 1000:
                self._limiter.count("session")

    def limited(self, wait_s: float) -> Problem:
        """The problem that a refusal by the session's own limit is."""
        limit = self.agent.definition.rate_limit if self.agent is not None else None
        return self._limiter.refused_by_session(limit or RateLimit(1, 1), wait_s)

    def reserve_session(self) -> None:
        """Charges the address for a session that is about to be created. Raises RateLimited."""
        if self._reserved is None:
            self._reserved = self._limiter.reserve(self._ip_address)

    def session_created(self, created: bool) -> None:
        """Keeps that charge, or gives it back: the session was there already."""
        if self._reserved is not None and not created:
            self._limiter.give_back(*self._reserved)
        self._reserved = None

    def settle(self, outcome: Literal["ran", "repeated", "refused"]) -> None:
        """Ends the call. What was refused costs nothing; an answer given again costs the address, and nobody else."""
        self.let_go()
        self.session_created(False)
        if self._settled:
            return
        self._settled = True
        if outcome == "ran":
            return
        for name, charge in self.charged.items():
            if outcome == "refused" or name != "address":
                self._limiter.give_back(*charge)
        bounds = self._limiter.bounds(self.agent) if self.agent is not None else None
        if bounds is not None and self._day_ends_s is not None and bounds.is_today(self._day_ends_s):
            bounds.untold_day -= 1

    def headers(self) -> dict[str, str]:
        """RateLimit and RateLimit-Policy: what the client has left of its own. What others have left is not shown to it."""
        found = []
        address = self._limiter.address_limit
        if "address" in self.charged and address is not None:
            found.append(("address", address, *self._limiter.remaining(self.charged["address"][0], address)))
        limit = self.agent.definition.rate_limit if self.agent is not None else None
        if limit is not None and self._session_ahead_ms is not None:
            ahead_s = self._session_ahead_ms / 1000
            found.append(("session", limit, left_of(limit, ahead_s), ahead_s))
        return rate_headers(found)


_WHOSE = {
    "address": "too many messages from this address",
    "misses": "too many calls from this address for what is not there",
    "sessions": "too many new sessions from this address",
    "domain": "too many messages from this website",
    "agent": "too many messages to this agent",
    "session": "too many messages in this session",
}


def _rate_limited(name: str, limit: RateLimit, wait_s: float) -> RateLimited:
    return RateLimited(_WHOSE[name], retry_after_s=wait_s, headers=rate_headers([(name, limit, 0, wait_s)]))


def _of_address(name: str, ip_address: str) -> str:
    """The key of a bucket that a client address has."""
    return f"{name}:{network(ip_address)}"


def _domain_name(domain: str) -> str:
    """A website domain as part of a key's name; one that is none, which a client made up, by its digest."""
    if re.fullmatch(r"[a-z0-9._-]{1,253}", domain):
        return domain
    return f"~{sha256(domain.encode()).hexdigest()[:32]}" if domain else "-"
