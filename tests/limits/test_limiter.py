"""The limits that no session has by itself: one for all pods, a refusal costs nothing, and Redis may be away."""

import asyncio
import re
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import msgspec
import pytest

from gateway.app import Stores, build_pod
from gateway.dev.servers.ports import HOST, free_port
from gateway.dev.servers.redis import RedisServer
from gateway.limits import buckets, ledger
from gateway.limits.admission import Admission
from gateway.limits.buckets import AgentUsage, Bucket, network, rate_headers
from gateway.limits.ledger import MAX_BUCKETS, Ledger
from gateway.limits.limiter import Limiter
from gateway.limits.refusals import Mode, Refusals
from gateway.metrics import Metrics
from gateway.problems import AgentBusy, LimitsUnavailable, Problem, QuotaExhausted, RateLimited
from gateway.settings import Settings
from persistence.model.agents import Agent, AgentDefinition, RateLimit
from persistence.redis.connection import connect
from persistence.redis.scripts import Scripts
from persistence.redis.shared_limits import RateUpdate, SharedLimits
from tests.conftest import PutAgent
from tests.support.pods import ServedPod, gated_pod
from tests.support.serving import ADMIN, served, wait_for
from tests.support.visiting import Rows, new_session_id, post_message, problem, say

ADDRESS = "192.0.2.1"
OTHER_ADDRESS = "192.0.2.2"
AGENT_ID = "01900000-0000-7000-8000-00000000a9e1"


class LimiterOfAPod(Limiter):
    """The limiter of a pod of its own, with its parts."""

    def __init__(
        self, shared: SharedLimits, *, mode: Mode = "enforce", max_buckets: int = MAX_BUCKETS, **options: Any
    ) -> None:
        self.shared, self.metrics = shared, Metrics()
        self.ledger = Ledger(shared, max_buckets=max_buckets)
        super().__init__(self.ledger, Refusals(self.metrics, mode), **options)

    def usage(self, agent: Agent) -> AgentUsage:
        usage = self.ledger.usage(agent)
        assert usage is not None
        return usage

    def bucket(self, key: str) -> Bucket:
        bucket = self.ledger.find(key)
        assert bucket is not None
        return bucket


def limiter(stores: Stores, messages: int = 0, per_s: int = 600, **options: Any) -> LimiterOfAPod:
    """A limiter as a pod of its own has it; `messages` per address."""
    address = RateLimit(messages, per_s) if messages else None
    return LimiterOfAPod(SharedLimits(stores.scripts, stores.keys), address=address, **options)


def agent_with(**limits: Any) -> Agent:
    return Agent(AGENT_ID, "shop", AgentDefinition(graph="echo", **limits))


def admitted(one: Limiter, tries: int, address: str = ADDRESS) -> int:
    """How many of so many tries are let through."""
    return count(lambda: one.admit_open(address), tries)


def count(call: Callable[[], object], tries: int) -> int:
    """How many of so many calls are let through."""
    let_through = 0
    for _ in range(tries):
        try:
            call()
            let_through += 1
        except Problem:
            continue
    return let_through


async def run(admission: Admission) -> None:
    """Lets an admitted turn run."""
    await admission.hold()
    await asyncio.sleep(0)  # asks for its session
    admission.began(0)


def counted(one: LimiterOfAPod) -> dict[tuple[str, str], float]:
    """What the metric says, by limit and mode."""
    found = [sample for metric in one.metrics.limited.collect() for sample in metric.samples]
    return {(sample.labels["limit"], sample.labels["mode"]): sample.value for sample in found}


# --------------------------------------------------------------------------------------------------------- one address


async def test_a_burst_of_the_whole_limit_is_let_through_and_no_more(stores: Stores) -> None:
    assert admitted(limiter(stores, 5), 20) == 5


async def test_a_refusal_says_when_to_come_back(stores: Stores) -> None:
    one = limiter(stores, 2)
    admitted(one, 2)
    with pytest.raises(RateLimited) as refused:
        one.admit_open(ADDRESS)
    assert refused.value.retry_after_s == pytest.approx(300, abs=5)
    assert refused.value.headers == {"RateLimit-Policy": '"address";q=2;w=600', "RateLimit": '"address";r=0;t=300'}


async def test_addresses_do_not_share_a_limit(stores: Stores) -> None:
    one = limiter(stores, 2)
    assert [admitted(one, 5, address) for address in (ADDRESS, OTHER_ADDRESS)] == [2, 2]


async def test_two_pods_share_a_limit_once_they_are_in_step(stores: Stores) -> None:
    one, other = limiter(stores, 10), limiter(stores, 10)
    assert (admitted(one, 4), admitted(other, 4)) == (4, 4)
    await one.sync()
    await other.sync()
    assert admitted(other, 10) == 2
    await other.sync()
    assert admitted(one, 1) <= 1
    await one.sync()
    assert (admitted(one, 10), admitted(other, 10)) == (0, 0)


async def test_without_being_in_step_each_pod_lets_a_whole_limit_through(stores: Stores) -> None:
    """The control: what makes the limit shared is the step, nothing else."""
    one, other = limiter(stores, 10), limiter(stores, 10)
    assert admitted(one, 20) + admitted(other, 20) == 20


async def test_a_refused_turn_costs_nothing(stores: Stores) -> None:
    one = limiter(stores, 4, 2)
    assert admitted(one, 4) == 4
    assert admitted(one, 1000) == 0
    await one.sync()
    # Charged for four turns and not a thousand: within one limit's time there is room again.
    await wait_for(lambda: admitted(one, 1), "room for the next turn", 10)
    learned, _ = await SharedLimits(stores.scripts, stores.keys).sync({f"address:{ADDRESS}": RateUpdate(0, 500)})
    assert learned[f"address:{ADDRESS}"].value <= 2000


async def test_a_limit_in_redis_goes_when_it_is_empty(stores: Stores) -> None:
    one = limiter(stores, 10, 1)
    admitted(one, 3)
    await one.sync()
    key = stores.keys.limit(f"address:{ADDRESS}")
    assert 0 < await stores.client.pttl(key) <= 1000

    async def gone() -> bool:
        return not await stores.client.exists(key)

    await wait_for(gone, "the limit expires")


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2:ffff::", "2001:db8:1:2::/64"),
        ("::1", "::/64"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("", "unknown"),
        ("evil:*\r\nx", "unknown"),
    ],
)
def test_a_client_is_an_ipv4_address_or_the_64_of_an_ipv6_address(address: str, expected: str) -> None:
    assert network(address) == expected


# ----------------------------------------------------------------------------------------------- all buckets or none


async def test_a_turn_is_charged_to_all_its_buckets(stores: Stores) -> None:
    one = limiter(stores, 10)
    agent = agent_with(agent_rate_limit=RateLimit(3, 600), domain_rate_limit=RateLimit(2, 600))
    assert count(lambda: one.admit_turn(agent, ADDRESS, "a.example"), 9) == 2
    assert count(lambda: one.admit_turn(agent, ADDRESS, "b.example"), 9) == 1
    assert {key: one.bucket(key).pending for key in one.ledger.keys} == {
        f"address:{ADDRESS}": 3,
        f"domain:{AGENT_ID}:a.example": 2,
        f"domain:{AGENT_ID}:b.example": 1,
        f"agent:{AGENT_ID}": 3,
    }


@pytest.mark.parametrize("full", ["agent_rate_limit", "domain_rate_limit", "turns_per_day"])
async def test_what_one_bucket_refuses_costs_the_others_nothing(stores: Stores, full: str) -> None:
    one = limiter(stores, 5)
    limits: dict[str, Any] = {"agent_rate_limit": RateLimit(9, 600), "domain_rate_limit": RateLimit(9, 600)}
    agent = agent_with(**limits | {full: 1 if full == "turns_per_day" else RateLimit(1, 600)})
    await one.prepare(agent)
    assert count(lambda: one.admit_turn(agent, ADDRESS, "a.example"), 50) == 1
    assert {one.bucket(key).pending for key in one.ledger.keys} == {1}
    # The address has four of its five left for another agent.
    assert admitted(one, 50) == 4


async def test_what_no_turn_came_of_is_given_back(stores: Stores) -> None:
    one = limiter(stores, 2)
    agent = agent_with(agent_rate_limit=RateLimit(2, 600), turns_per_day=2)
    await one.prepare(agent)

    def refused_later() -> Admission:
        admission = one.admit_turn(agent, ADDRESS, "")
        admission.close("refused")
        return admission

    assert count(refused_later, 50) == 50
    assert count(lambda: one.admit_turn(agent, ADDRESS, ""), 50) == 2
    await one.sync()
    assert await stores.client.get(stores.keys.limit(f"day:{AGENT_ID}")) == b"2"


async def test_what_is_not_given_back_stays_charged(stores: Stores) -> None:
    """The control of the test before."""
    one = limiter(stores, 2)
    assert count(lambda: one.admit_open(ADDRESS).close("ran"), 50) == 2


async def test_an_answer_given_again_costs_the_address_and_nobody_else(stores: Stores) -> None:
    one = limiter(stores, 3)
    agent = agent_with(agent_rate_limit=RateLimit(1, 600), turns_per_day=1)
    await one.prepare(agent)
    assert count(lambda: one.admit_turn(agent, ADDRESS, "").close("repeated"), 50) == 3
    assert count(lambda: one.admit_turn(agent, OTHER_ADDRESS, ""), 50) == 1


async def test_settling_twice_gives_back_once(stores: Stores) -> None:
    one = limiter(stores, 2)
    kept, given_back = one.admit_open(ADDRESS), one.admit_open(ADDRESS)
    given_back.close("refused")
    given_back.close("refused")
    kept.close("ran")
    kept.close("refused")
    assert admitted(one, 50) == 1


def test_what_a_bucket_has_run_out_of_by_itself_is_not_given_back_as_well() -> None:
    """Else calls that are refused late would make room for others."""
    bucket = Bucket(RateLimit(1, 10))
    bucket.charge(100.0)
    assert bucket.wait_s(105.0) == 5.0
    # At 110 it is empty, and at 115 charged for another turn.
    bucket.charge(115.0)
    bucket.refund(100.0)
    assert bucket.wait_s(116.0) == 9.0
    bucket.refund(115.0)
    assert bucket.wait_s(116.0) <= 0


async def test_what_is_given_back_is_there_on_every_pod(stores: Stores) -> None:
    one, other = limiter(stores, 2), limiter(stores, 2)
    given_back = one.admit_open(ADDRESS)
    one.admit_open(ADDRESS)
    await one.sync()
    assert admitted(other, 1) == 1, "it knows nothing yet"
    await other.sync()
    assert admitted(other, 1) == 0
    given_back.close("refused")
    await one.sync()
    learned, _ = await SharedLimits(stores.scripts, stores.keys).sync({f"address:{ADDRESS}": RateUpdate(0, 300_000)})
    assert 590_000 < learned[f"address:{ADDRESS}"].value <= 600_000


async def test_an_operator_may_change_a_limit_at_any_time(stores: Stores) -> None:
    one = limiter(stores)
    small, large = (agent_with(agent_rate_limit=RateLimit(messages, 600)) for messages in (2, 6))
    assert count(lambda: one.admit_turn(small, ADDRESS, ""), 50) == 2
    # A third of the new limit's time is what two of six take: what was charged before is charged on.
    assert count(lambda: one.admit_turn(large, ADDRESS, ""), 50) == 0
    one.bucket(f"agent:{AGENT_ID}").tat_s -= 400
    assert count(lambda: one.admit_turn(large, ADDRESS, ""), 50) == 4


@pytest.mark.parametrize("domain", ["", "x" * 300, "a b", "gw:{0}:agent", "bücher.example", "*\r\n"])
async def test_what_a_client_makes_up_as_its_domain_is_no_name_of_a_key(stores: Stores, domain: str) -> None:
    one = limiter(stores)
    one.admit_turn(agent_with(domain_rate_limit=RateLimit(2, 600)), ADDRESS, domain)
    [key] = one.ledger.keys
    assert re.fullmatch(rf"domain:{AGENT_ID}:(-|~[0-9a-f]{{32}})", key)


# ----------------------------------------------------------------------------------------------------- step and memory


async def test_all_that_is_new_is_told_in_one_round_trip(stores: Stores) -> None:
    one = limiter(stores, 10)
    agent = agent_with(agent_rate_limit=RateLimit(9999, 60), max_running_turns=9, turns_per_day=9999)
    await one.prepare(agent)
    for number in range(400):
        one.admit_turn(agent, f"198.51.{number // 200}.{number % 200}", "a.example")
    before = await script_calls(stores)
    await one.sync()
    assert await script_calls(stores) - before == 1
    keys = [key async for key in stores.client.scan_iter(match="gw:limit:*")]
    assert len(keys) == 400 + 1 + 1, "addresses, the agent, its day; nothing runs"


async def script_calls(stores: Stores) -> int:
    found = await stores.client.execute_command("INFO", "commandstats")
    return sum(int(found.get(name, {"calls": 0})["calls"]) for name in ("cmdstat_evalsha", "cmdstat_eval"))


async def test_nothing_new_is_no_round_trip(stores: Stores) -> None:
    one = limiter(stores, 10)
    admitted(one, 1)
    await one.sync()
    before = await script_calls(stores)
    await one.sync()
    assert await script_calls(stores) == before


async def test_a_pod_forgets_addresses_that_are_not_charged_any_more(stores: Stores) -> None:
    one = limiter(stores, 1000, 1)
    admitted(one, 100)

    async def forgotten() -> bool:
        await one.sync()
        return not one.ledger.keys

    await wait_for(forgotten, "the address is forgotten")


async def test_a_flood_of_addresses_fills_no_memory_and_who_is_near_its_limit_is_remembered(
    stores: Stores,
) -> None:
    one = limiter(stores, 4, max_buckets=100)
    assert admitted(one, 9) == 4
    assert admitted(one, 1, OTHER_ADDRESS) == 1
    for number in range(5000):
        admitted(one, 1, f"2001:db8:{number:x}::1")
    assert len(one.ledger.keys) == 100
    assert one.ledger.pending <= 100
    assert admitted(one, 9) == 0, "the heavy one is still known"
    # The other, of which one turn was known, is forgotten here; Redis would have told, had there been time.
    assert admitted(one, 9, OTHER_ADDRESS) == 4


async def test_who_was_forgotten_in_a_flood_is_learned_anew(stores: Stores) -> None:
    one = limiter(stores, 5, max_buckets=10)
    assert admitted(one, 2) == 2
    await one.sync()
    for number in range(100):
        admitted(one, 1, f"2001:db8:{number:x}::1")
    assert f"address:{ADDRESS}" not in one.ledger.keys
    assert admitted(one, 1) == 1
    await one.sync()
    assert admitted(one, 9) == 2


# ------------------------------------------------------------------------------------------------------ Redis is away


async def test_without_redis_a_pod_goes_on_with_what_it_knows(stores: Stores) -> None:
    away = connect(f"redis://{HOST}:{free_port()}/0")
    one = LimiterOfAPod(SharedLimits(Scripts(away), stores.keys), address=RateLimit(3, 600))
    assert admitted(one, 2) == 2
    await one.sync()
    assert admitted(one, 5) == 1
    await one.sync()
    assert admitted(one, 5) == 0
    await away.aclose()


@pytest.mark.parametrize("policy", ["local", "refuse"])
async def test_a_redis_that_goes_away_is_met_as_it_is_set(stores: Stores, tmp_path: Path, policy: str) -> None:
    """A real one, stopped and started again; what was let through meanwhile is told afterwards."""
    with RedisServer(tmp_path, free_port()) as server:
        client = connect(server.url)
        other = SharedLimits(Scripts(client), stores.keys)
        one = LimiterOfAPod(other, address=RateLimit(50, 600), refuse_on_failure=policy == "refuse", failed_s=0.2)
        assert admitted(one, 1) == 1
        await one.sync()
        await asyncio.to_thread(server.stop)
        assert admitted(one, 1) == 1, "nobody has noticed yet"

        async def noticed() -> bool:
            await one.sync()
            try:
                one.admit_open(OTHER_ADDRESS).close("refused")
            except LimitsUnavailable as error:
                assert (error.status, error.retry_after_s) == (503, 2)
                return True
            return policy == "local" and one.ledger.failing_since_s is not None

        await wait_for(noticed, "the pod notices")
        await asyncio.to_thread(server.start)

        async def mended() -> bool:
            await one.sync()
            return one.ledger.failing_since_s is None

        await wait_for(mended, "the pod is in step again")
        assert admitted(one, 1) == 1
        await one.sync()
        learned, _ = await other.sync({f"address:{ADDRESS}": RateUpdate(0, 12_000)})
        # Three turns of 12 s. The one whose fate was unknown may have been told twice, never not at all.
        assert 30_000 < learned[f"address:{ADDRESS}"].value <= 48_000
        await client.aclose()


def test_a_long_outage_is_not_charged_for_when_it_is_over() -> None:
    """A steady visitor, who was never near the limit, is not refused because an hour's turns are told at once."""
    bucket = Bucket(RateLimit(10, 10))
    for second in range(0, 3600, 2):
        now = 1000.0 + second
        bucket.charge(now)
        told, bucket.pending = bucket.pending, 0
        bucket.restore_pending(told, now + 0.2)
    assert bucket.pending == 1


# ------------------------------------------------------------------------------------------------- an agent's bounds


async def test_turns_that_run_are_bounded_over_all_pods(stores: Stores) -> None:
    one, other = limiter(stores), limiter(stores)
    agent = agent_with(max_running_turns=3)
    await one.prepare(agent)
    turns = [one.admit_turn(agent, ADDRESS, "") for _ in range(2)]
    for turn in turns:
        await run(turn)
    await one.sync()
    await other.prepare(agent)
    elsewhere = other.admit_turn(agent, ADDRESS, "")
    await run(elsewhere)
    with pytest.raises(AgentBusy) as refused:
        other.admit_turn(agent, ADDRESS, "")
    assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (429, "agent_busy", 1)
    turns[0].close("ran")
    await one.sync()
    await other.sync()
    await run(other.admit_turn(agent, ADDRESS, ""))
    with pytest.raises(AgentBusy):
        other.admit_turn(agent, ADDRESS, "")


async def test_the_turns_of_a_dead_pod_do_not_count_for_ever(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "RUNNING_LIFE_MS", 300)
    monkeypatch.setattr(buckets, "RUNNING_LIFE_MS", 300)
    dead, other = limiter(stores), limiter(stores)
    agent = agent_with(max_running_turns=1)
    await dead.prepare(agent)
    await run(dead.admit_turn(agent, ADDRESS, ""))
    await dead.sync()
    await other.prepare(agent)
    with pytest.raises(AgentBusy):
        other.admit_turn(agent, ADDRESS, "")

    async def free() -> bool:
        await other.sync()
        return count(lambda: other.admit_turn(agent, ADDRESS, "").close("refused"), 1) == 1

    await wait_for(free, "nobody counts the dead pod's turn")
    # The control: a pod that lives, and tells so, goes on to count.
    await dead.sync()
    await other.sync()
    with pytest.raises(AgentBusy):
        other.admit_turn(agent, ADDRESS, "")


async def test_a_turn_that_waits_holds_no_place(stores: Stores) -> None:
    one = limiter(stores)
    agent = agent_with(max_running_turns=1)
    await one.prepare(agent)
    waits, runs = one.admit_turn(agent, ADDRESS, ""), one.admit_turn(agent, ADDRESS, "")
    await waits.hold()
    waits.let_go()
    await run(runs)
    with pytest.raises(AgentBusy):
        await waits.hold()
    runs.close("ran")
    await waits.hold()


@pytest.mark.parametrize("begins", [True, False])
async def test_who_finds_the_last_place_with_a_turn_that_asks_waits_for_what_comes_of_it(
    stores: Stores, begins: bool
) -> None:
    """A session that lets a message wait must not have others refused meanwhile."""
    one = limiter(stores)
    agent = agent_with(max_running_turns=1)
    await one.prepare(agent)
    asks, next_one = one.admit_turn(agent, ADDRESS, ""), one.admit_turn(agent, ADDRESS, "")
    await asks.hold()
    held = asyncio.create_task(next_one.hold())
    await asyncio.sleep(0)
    assert not held.done()
    if begins:
        asks.began(0)
        with pytest.raises(AgentBusy):
            await held
    else:
        asks.let_go()
        await held
        next_one.began(0)
        with pytest.raises(AgentBusy):
            one.admit_turn(agent, ADDRESS, "")


async def test_however_many_ask_at_once_no_more_than_the_bound_run(stores: Stores) -> None:
    one = limiter(stores)
    agent = agent_with(max_running_turns=3)
    await one.prepare(agent)

    async def try_one() -> bool:
        try:
            await run(one.admit_turn(agent, ADDRESS, ""))
        except AgentBusy:
            return False
        return True

    assert sum(await asyncio.gather(*(try_one() for _ in range(50)))) == 3


async def test_the_quota_of_a_day_is_counted_over_pods_and_restarts(stores: Stores) -> None:
    agent = agent_with(turns_per_day=3)
    for turns in (1, 1):
        pod = limiter(stores)
        await pod.prepare(agent)
        assert count(lambda pod=pod: pod.admit_turn(agent, ADDRESS, ""), turns) == turns  # type: ignore[misc]
        await pod.sync()
    late = limiter(stores)
    await late.prepare(agent)
    assert count(lambda: late.admit_turn(agent, ADDRESS, ""), 9) == 1
    with pytest.raises(QuotaExhausted) as refused:
        late.admit_turn(agent, ADDRESS, "")
    now_s = (await stores.client.time())[0]
    assert refused.value.retry_after_s == pytest.approx(86_400 - now_s % 86_400, abs=5)
    await late.sync()
    key = stores.keys.limit(f"day:{AGENT_ID}")
    assert await stores.client.get(key) == b"3"
    assert await stores.client.expiretime(key) % 86_400 == 0


async def test_a_new_day_has_its_whole_quota(stores: Stores) -> None:
    one = limiter(stores)
    agent = agent_with(turns_per_day=1)
    await one.prepare(agent)
    assert count(lambda: one.admit_turn(agent, ADDRESS, ""), 9) == 1
    one.usage(agent).day_ends_s -= 86_400
    assert count(lambda: one.admit_turn(agent, ADDRESS, ""), 9) == 1


async def test_turns_that_are_being_told_are_among_those_of_the_day(stores: Stores, monkeypatch: pytest.MonkeyPatch) -> None:
    """Redis may take its time to hear of them; none is let through again meanwhile."""
    one = limiter(stores)
    agent = agent_with(turns_per_day=3)
    await one.prepare(agent)
    assert count(lambda: one.admit_turn(agent, ADDRESS, ""), 2) == 2
    heard, tell = asyncio.Event(), one.shared.sync

    async def tell_slowly(told: Any) -> Any:
        await heard.wait()
        return await tell(told)

    monkeypatch.setattr(one.shared, "sync", tell_slowly)
    telling = asyncio.create_task(one.sync())
    await asyncio.sleep(0)
    assert count(lambda: one.admit_turn(agent, ADDRESS, ""), 9) == 1
    heard.set()
    await telling
    assert count(lambda: one.admit_turn(agent, ADDRESS, ""), 9) == 0
    await one.sync()
    assert await stores.client.get(stores.keys.limit(f"day:{AGENT_ID}")) == b"3"


async def test_a_turn_that_is_refused_late_costs_nothing_of_the_day(stores: Stores) -> None:
    """It waited for its session, and the pod has told and learned in between."""
    one = limiter(stores)
    agent = agent_with(turns_per_day=1)
    await one.prepare(agent)
    waiting = one.admit_turn(agent, ADDRESS, "")
    await one.sync()
    waiting.close("refused")
    assert count(lambda: one.admit_turn(agent, ADDRESS, ""), 9) == 1
    await one.sync()
    assert await stores.client.get(stores.keys.limit(f"day:{AGENT_ID}")) == b"1"


async def test_a_turn_of_yesterday_that_is_refused_today_gives_nothing_back(stores: Stores) -> None:
    one = limiter(stores)
    agent = agent_with(turns_per_day=1)
    await one.prepare(agent)
    usage = one.usage(agent)
    usage.day_ends_s = monotonic() + 1
    waiting = one.admit_turn(agent, ADDRESS, "")
    usage.day_ends_s = monotonic()
    assert count(lambda: one.admit_turn(agent, ADDRESS, ""), 9) == 1
    waiting.close("refused")
    assert count(lambda: one.admit_turn(agent, ADDRESS, ""), 9) == 0


async def test_a_pod_that_does_not_know_the_day_asks_before_the_first_turn(stores: Stores) -> None:
    """Once, however many come at the same time; and not at all for an agent without bounds."""
    agent = agent_with(turns_per_day=1)
    first = limiter(stores)
    await first.prepare(agent)
    first.admit_turn(agent, ADDRESS, "")
    await first.sync()
    other = limiter(stores)
    before = await script_calls(stores)
    await asyncio.gather(*(other.prepare(agent) for _ in range(20)))
    await other.prepare(agent_with())
    assert await script_calls(stores) - before == 1
    with pytest.raises(QuotaExhausted):
        other.admit_turn(agent, ADDRESS, "")


# ------------------------------------------------------------------------------------------------------------- modes


async def test_in_shadow_all_is_counted_and_nothing_refused(stores: Stores) -> None:
    one = limiter(stores, 2, sessions=RateLimit(1, 600), mode="shadow")
    agent = agent_with(agent_rate_limit=RateLimit(3, 600), turns_per_day=1, max_running_turns=1)
    await one.prepare(agent)
    for _ in range(4):
        admission = one.admit_turn(agent, ADDRESS, "")
        await run(admission)
        admission.reserve_session()
        admission.session_created(True)
    assert counted(one) == {
        ("address", "shadow"): 2,
        ("agent", "shadow"): 1,
        ("day", "shadow"): 3,
        ("running", "shadow"): 3,
        ("sessions", "shadow"): 3,
    }


async def test_when_it_is_enforced_the_same_is_refused(stores: Stores) -> None:
    """The control of the test before."""
    one = limiter(stores, 2)
    assert admitted(one, 5) == 2
    assert counted(one) == {("address", "enforce"): 3}


async def test_switched_off_no_limit_is_looked_at(stores: Stores) -> None:
    one = limiter(stores, 1, sessions=RateLimit(1, 600), mode="off")
    agent = agent_with(agent_rate_limit=RateLimit(1, 600), turns_per_day=1, max_running_turns=1)
    await one.prepare(agent)
    for _ in range(4):
        admission = one.admit_turn(agent, ADDRESS, "")
        await run(admission)
        admission.reserve_session()
    assert (counted(one), one.ledger.keys, one.ledger.usage(agent)) == ({}, [], None)


# ---------------------------------------------------------------------------------------------------------- over HTTP


@pytest.fixture
async def two_pods(settings: Settings, stores: Stores) -> AsyncIterator[list[httpx.AsyncClient]]:
    """Clients of two pods that let five turns in ten minutes through."""
    limited = msgspec.structs.replace(settings, address_rate_limit="5/600")
    own_stores = Stores(limited)
    async with (
        served(await build_pod(limited, stores)) as one,
        served(await build_pod(limited, own_stores)) as other,
    ):
        yield [one, other]
    await own_stores.close()


async def test_over_http_a_refusal_is_429_on_every_pod(two_pods: list[httpx.AsyncClient], put_agent: PutAgent) -> None:
    await put_agent("shop")
    one, other = two_pods
    for _ in range(5):
        assert (await post_message(one, new_session_id())).status_code == 200
    answer = await post_message(one, new_session_id())
    document = problem(answer, 429, "rate_limited")
    assert int(answer.headers["retry-after"]) == document["retry_after"] > 0
    problem(await one.post("/api/sessions", json={"agent_id": "shop"}), 429, "rate_limited")

    async def refused() -> bool:
        return (await post_message(other, new_session_id())).status_code == 429

    await wait_for(refused, "the other pod refuses too")


# draft-ietf-httpapi-ratelimit-headers-11: Lists of Strings with Integers as parameters (RFC 9651).
POLICY = re.compile(r'"(\w+)";q=(\d+);w=(\d+)')
STATE = re.compile(r'"(\w+)";r=(\d+);t=(\d+)')


def rate_fields(answer: httpx.Response) -> dict[str, tuple[int, int, int, int]]:
    """What the RateLimit fields say: quota, window, left and seconds by name."""
    policies = [POLICY.fullmatch(item) for item in answer.headers["ratelimit-policy"].split(", ")]
    states = [STATE.fullmatch(item) for item in answer.headers["ratelimit"].split(", ")]
    found = {}
    for policy, state in zip(policies, states, strict=True):
        assert policy, answer.headers
        assert state, answer.headers
        assert policy[1] == state[1]
        found[policy[1]] = (int(policy[2]), int(policy[3]), int(state[2]), int(state[3]))
    return found


async def test_every_answer_says_what_is_left(two_pods: list[httpx.AsyncClient], put_agent: PutAgent) -> None:
    await put_agent("shop", rate_limit=RateLimit(2, 60), agent_rate_limit=RateLimit(1000, 60))
    session_id = new_session_id()
    first = await post_message(two_pods[0], session_id)
    # The agent's limit is nobody's business but its own.
    assert rate_fields(first) == {"address": (5, 600, 4, 120), "session": (2, 60, 1, 30)}
    body = {"message": "Hello", "session_id": session_id}
    streamed = await two_pods[0].post("/api/chat/shop/stream", json=body)
    fields = rate_fields(streamed)
    assert (fields["address"][2], fields["session"][2]) == (3, 0)
    refused = await post_message(two_pods[0], session_id)
    problem(refused, 429, "rate_limited")
    fields = rate_fields(refused)
    assert fields == {"session": (2, 60, 0, int(refused.headers["retry-after"]))}
    # The refusal cost the address nothing: three are left.
    assert rate_fields(await post_message(two_pods[0], new_session_id()))["address"][2] == 2


def test_without_a_limit_there_are_no_fields() -> None:
    assert rate_headers([]) == {}


@pytest.fixture
async def start_pod(settings: Settings, stores: Stores) -> AsyncIterator[Callable[..., Any]]:
    """Starts a pod with a gated graph: `await start_pod(limit_mode="shadow")`."""
    async with AsyncExitStack() as stack:

        async def start(**changes: Any) -> ServedPod:
            return await stack.enter_async_context(gated_pod(settings, **changes))

        yield start


async def test_an_agent_that_is_switched_off_answers_nobody_within_5_s_on_all_pods(
    start_pod: Callable[..., Any], put_agent: PutAgent
) -> None:
    two_pods = [(await start_pod()).client for _ in range(2)]
    await put_agent("shop")
    for pod in two_pods:
        await say(pod, new_session_id())
    answer = await two_pods[0].put("/api/agents/shop", json={"graph": "echo", "active": False}, headers=ADMIN)
    assert answer.status_code == 200
    for pod in two_pods:

        async def silent(pod: httpx.AsyncClient = pod) -> bool:
            return (await post_message(pod, new_session_id())).status_code == 403

        await wait_for(silent, "the pod refuses", 5)
        problem(await post_message(pod, new_session_id()), 403, "agent_inactive")
        body = {"message": "Hello", "session_id": new_session_id()}
        problem(await pod.post("/api/chat/shop/stream", json=body), 403, "agent_inactive")
        problem(await pod.post("/api/sessions", json={"agent_id": "shop"}), 403, "agent_inactive")
    await two_pods[1].put("/api/agents/shop", json={"graph": "echo", "active": True}, headers=ADMIN)

    async def answers() -> bool:
        return all([(await post_message(pod, new_session_id())).status_code == 200 for pod in two_pods])

    await wait_for(answers, "all pods answer again", 5)


async def test_an_agent_at_its_bound_is_busy_and_says_when_to_come_back(
    start_pod: Callable[..., Any], put_agent: PutAgent
) -> None:
    pod: ServedPod = await start_pod()
    await put_agent("shop", graph="gated", max_running_turns=2, rate_limit=RateLimit(1, 600))
    await put_agent("other", graph="echo", max_running_turns=2)
    running = [pod.send(text, new_session_id()) for text in ("One", "Two")]
    for text in ("One", "Two"):
        await pod.gated.has_started(text)
    session_id = new_session_id()
    refused = await pod.ask("Three", session_id)
    problem(refused, 429, "agent_busy")
    assert refused.headers["retry-after"] == "1"
    assert (await post_message(pod.client, new_session_id(), agent="other")).status_code == 200
    pod.gated.open()
    for turn in running:
        assert (await turn).status_code == 200
    # The refused one cost the session's own limit, of one message, nothing.
    assert (await pod.ask("Three", session_id)).status_code == 200


async def test_the_limit_of_a_session_is_counted_in_shadow_too(start_pod: Callable[..., Any], put_agent: PutAgent) -> None:
    pod: ServedPod = await start_pod(limit_mode="shadow")
    await put_agent("shop", rate_limit=RateLimit(2, 600))
    session_id = new_session_id()
    for _ in range(5):
        await say(pod.client, session_id)
    metrics = (await pod.client.get("/metrics")).text
    assert 'gateway_limited_total{limit="session",mode="shadow"} 3.0' in metrics


async def test_switched_off_the_limit_of_a_session_refuses_nothing(
    start_pod: Callable[..., Any], put_agent: PutAgent
) -> None:
    pod: ServedPod = await start_pod(limit_mode="off")
    await put_agent("shop", rate_limit=RateLimit(1, 600))
    session_id = new_session_id()
    for _ in range(3):
        answer = await post_message(pod.client, session_id)
        assert answer.status_code == 200
        assert "ratelimit" not in answer.headers


async def test_sessions_are_charged_when_they_are_created_and_only_then(
    start_pod: Callable[..., Any], put_agent: PutAgent, rows: Rows
) -> None:
    pod: ServedPod = await start_pod(address_session_limit="3/600")
    await put_agent("shop")
    await put_agent("locked", require_token=True)
    minted = await pod.client.post("/api/sessions", json={"agent_id": "shop"})
    assert minted.status_code == 201
    known = new_session_id()
    await say(pod.client, known)
    # Found again, refused, misspelt: nothing is created, nothing is charged.
    for _ in range(5):
        await say(pod.client, known)
        assert (await pod.client.post("/api/sessions", json={"agent_id": "shop", "session_id": known})).status_code == 200
        problem(await post_message(pod.client, new_session_id(), agent="locked"), 404, "session_not_found")
        problem(await pod.client.post("/api/sessions", json={"agent_id": "nobody"}), 404, "agent_not_found")
    opened = await pod.client.post("/api/sessions", json={"agent_id": "shop", "session_id": new_session_id()})
    assert opened.status_code == 201
    refused = await post_message(pod.client, new_session_id())
    problem(refused, 429, "rate_limited")
    assert 190 <= int(refused.headers["retry-after"]) <= 200
    assert rate_fields(refused)["sessions"][:3] == (3, 600, 0)
    problem(await pod.client.post("/api/sessions", json={"agent_id": "shop"}), 429, "rate_limited")
    # Who has a session goes on.
    await say(pod.client, known)
    assert (await pod.client.post("/api/sessions", json={"agent_id": "shop", "session_id": known})).status_code == 200


async def test_what_a_sync_that_breaks_off_had_taken_out_is_part_of_the_next(
    stores: Stores, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever it breaks off with: a limit is not lifted by a fault."""
    shared = SharedLimits(stores.scripts, stores.keys)
    ledger, limit = Ledger(shared), RateLimit(10, 60)
    bucket = ledger.bucket("address:192.0.2.1", limit)
    ledger.charge("address:192.0.2.1", bucket, monotonic())

    async def broken(updates: object) -> None:
        raise KeyError("unforeseen")

    with monkeypatch.context() as patch:
        patch.setattr(shared, "sync", broken)
        with pytest.raises(KeyError):
            await ledger.sync()
    assert (ledger.pending, bucket.pending) == (1, 1)
    await ledger.sync()
    assert (ledger.pending, bucket.pending) == (0, 0)
