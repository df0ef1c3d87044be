"""The limit per client address: one limit for all pods, a refusal costs nothing, and Redis may be away."""

from collections.abc import AsyncIterator

import httpx
import msgspec
import pytest

from gateway.app import Stores, build_pod
from gateway.limits import AddressLimiter
from gateway.problems import RateLimited
from gateway.servers import HOST, free_port
from gateway.settings import Settings
from persistence.connection import connect
from persistence.limits import Limits
from persistence.scripts import Scripts
from tests.conftest import PutAgent
from tests.support.serving import served, wait_for
from tests.support.visiting import new_session_id, post_message, problem

ADDRESS = "192.0.2.1"


def limiter(stores: Stores, messages: int, per_s: int) -> AddressLimiter:
    """A limiter as a pod of its own has it."""
    return AddressLimiter(Limits(stores.scripts, stores.keys), messages, per_s)


def admitted(one: AddressLimiter, tries: int, address: str = ADDRESS) -> int:
    """How many of so many tries are let through."""
    let_through = 0
    for _ in range(tries):
        try:
            one.admit(address)
            let_through += 1
        except RateLimited:
            continue
    return let_through


async def test_a_burst_of_the_whole_limit_is_let_through_and_no_more(stores: Stores) -> None:
    assert admitted(limiter(stores, 5, 600), 20) == 5


async def test_a_refusal_says_when_to_come_back(stores: Stores) -> None:
    one = limiter(stores, 2, 600)
    admitted(one, 2)
    with pytest.raises(RateLimited) as refused:
        one.admit(ADDRESS)
    assert refused.value.retry_after_s == pytest.approx(300, abs=5)


async def test_addresses_do_not_share_a_limit(stores: Stores) -> None:
    one = limiter(stores, 2, 600)
    assert [admitted(one, 5, address) for address in ("192.0.2.1", "192.0.2.2")] == [2, 2]


async def test_two_pods_share_a_limit_once_they_are_in_step(stores: Stores) -> None:
    one, other = limiter(stores, 10, 600), limiter(stores, 10, 600)
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
    one, other = limiter(stores, 10, 600), limiter(stores, 10, 600)
    assert admitted(one, 20) + admitted(other, 20) == 20


async def test_a_refused_turn_costs_nothing(stores: Stores) -> None:
    one = limiter(stores, 4, 2)
    assert admitted(one, 4) == 4
    assert admitted(one, 1000) == 0
    await one.sync()
    # Charged for four turns and not a thousand: within one limit's time there is room again.
    await wait_for(lambda: admitted(one, 1), "room for the next turn", 10)
    ahead_ms = await Limits(stores.scripts, stores.keys).charge(f"address:{ADDRESS}", 0, 500)
    assert ahead_ms <= 2000


async def test_a_limit_in_redis_goes_when_it_is_empty(stores: Stores) -> None:
    one = limiter(stores, 10, 1)
    admitted(one, 3)
    await one.sync()
    key = stores.keys.limit(f"address:{ADDRESS}")
    assert 0 < await stores.client.pttl(key) <= 1000

    async def gone() -> bool:
        return not await stores.client.exists(key)

    await wait_for(gone, "the limit expires")


async def test_a_pod_forgets_addresses_that_are_not_charged_any_more(stores: Stores) -> None:
    one = limiter(stores, 1000, 1)
    admitted(one, 100)

    async def forgotten() -> bool:
        await one.sync()
        return not one._buckets

    await wait_for(forgotten, "the address is forgotten")


async def test_without_redis_a_pod_goes_on_with_what_it_knows(settings: Settings, stores: Stores) -> None:
    away = connect(f"redis://{HOST}:{free_port()}/0")
    one = AddressLimiter(Limits(Scripts(away), stores.keys), 3, 600)
    assert admitted(one, 2) == 2
    await one.sync()
    assert admitted(one, 5) == 1
    await one.sync()
    assert admitted(one, 5) == 0
    await away.aclose()


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
