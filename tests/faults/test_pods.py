"""Pods that die, stall, or lose their clients in mid-turn."""

import asyncio
import random
import signal
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import msgspec
import pytest

from gateway.app import Stores
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.support.pods import fields_of, gateway_process
from tests.support.serving import ROOT, GatewayProcess, wait_for

PROJECT = ROOT / "tests" / "data" / "project" / "langgraph.json"
SESSION_ID = "session_1234567890_abc123xyz"
LEASE_S = 2
ROUNDS = 2
SESSIONS = 12
MESSAGES = 10
Rows = Callable[..., Awaitable[list[Any]]]
Flush = Callable[[], Awaitable[None]]
Start = Callable[[], Awaitable[GatewayProcess]]


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With a short lease, and a graph that takes as many seconds as a message begins with."""
    return msgspec.structs.replace(settings, graphs=str(PROJECT), lease_s=LEASE_S)


@pytest.fixture
async def start(settings: Settings, stores: Stores, put_agent: PutAgent, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a pod that can be killed; its agent is `shop`."""
    await put_agent(graph="paced")
    environment = {"GATEWAY_LEASE_S": str(LEASE_S), "GATEWAY_GRAPHS": str(PROJECT)}
    async with AsyncExitStack() as stack:

        async def start() -> GatewayProcess:
            return await stack.enter_async_context(gateway_process("serve", settings, tmp_path, **environment))

        yield start


def send(url: object, message: str, **fields: Any) -> "asyncio.Task[httpx.Response]":
    """Sends a message to a pod over a connection of its own."""

    async def ask() -> httpx.Response:
        async with httpx.AsyncClient(timeout=40) as client:
            body = {"message": message, "session_id": SESSION_ID, **fields}
            return await client.post(f"{url}/api/chat/shop/message", json=body)

    return asyncio.create_task(ask())


async def turn_of(stores: Stores, unlike: str = "") -> str:
    """Waits until a turn runs on the session, another one than `unlike`; its id."""

    async def running() -> str:
        turn = (await fields_of(stores, SESSION_ID)).get("turn", "")
        return turn if turn != unlike else ""

    return str(await wait_for(running, "a turn runs"))


async def stored(rows: Rows) -> list[str]:
    return [row[0] for row in await rows("SELECT content FROM agent_messages ORDER BY session_id, seq")]


async def test_a_pod_that_is_killed_blocks_its_session_for_its_lease_at_most(
    start: Start, client: httpx.AsyncClient, stores: Stores, flush: Flush, rows: Rows
) -> None:
    dying, living = await start(), client.base_url
    assert (await send(dying.url, "0 Before")).status_code == 200
    lost = send(dying.url, "60 Lost")
    await turn_of(stores)
    dying.kill()
    killed = monotonic()
    with pytest.raises(httpx.TransportError):
        await lost

    # Until the lease has run out nobody can know that the pod is dead.
    assert (await send(living, "0 Too early", if_busy="reject")).json()["code"] == "turn_in_progress"
    after = await send(living, "0 After")

    assert after.json()["response"] == "Answer to 0 After"
    assert after.json()["metadata"]["history"] == 2
    # The lease and a second; three more for a machine that has other things to do.
    assert monotonic() - killed < LEASE_S + 1 + 3
    await flush()
    assert await stored(rows) == ["0 Before", "Answer to 0 Before", "0 After", "Answer to 0 After"]


async def test_a_worker_lets_the_turn_of_a_killed_pod_go_and_gives_the_session_its_ttl_back(
    start: Start, settings: Settings, stores: Stores, flush: Flush, tmp_path: Path
) -> None:
    pod = await start()
    key = stores.keys.session(SESSION_ID)
    assert (await send(pod.url, "0 Before")).status_code == 200
    await flush()
    before, ttl_s = await fields_of(stores, SESSION_ID), await stores.client.ttl(key)
    assert 0 < ttl_s <= 1800
    lost = send(pod.url, "60 Lost")
    await turn_of(stores)
    pod.kill()
    with pytest.raises(httpx.TransportError):
        await lost
    assert await stores.client.ttl(key) == -1

    async def has_ttl() -> bool:
        return bool(await stores.client.ttl(key) > 0)

    async with gateway_process("worker", settings, tmp_path) as worker:
        await wait_for(has_ttl, "the worker lets the turn go")
        assert await fields_of(stores, SESSION_ID) == before
        assert ttl_s - 20 < await stores.client.ttl(key) <= ttl_s
        assert await stores.client.zcard(stores.keys.running(0)) == 0
        assert worker.stop() == 0


async def test_a_pod_that_stalls_past_its_lease_commits_nothing_when_it_wakes_up(
    start: Start, client: httpx.AsyncClient, stores: Stores, flush: Flush, rows: Rows
) -> None:
    stalled, other = await start(), client.base_url
    expected: list[str] = []
    for number in range(ROUNDS):
        late = send(stalled.url, f"2 Late {number}")
        await turn_of(stores)
        stalled.signal(signal.SIGSTOP)
        try:
            answer = await send(other, f"0 Other {number}")
            committed = await fields_of(stores, SESSION_ID)
            assert not late.done()
        finally:
            stalled.signal(signal.SIGCONT)
        assert answer.json()["response"] == f"Answer to 0 Other {number}"
        assert answer.json()["metadata"]["history"] == 2 * number
        assert ((await late).status_code, (await late).json()["code"]) == (409, "turn_superseded")
        assert await fields_of(stores, SESSION_ID) == committed
        expected += [f"0 Other {number}", f"Answer to 0 Other {number}"]
    await flush()
    assert await stored(rows) == expected


async def test_a_pod_that_stalls_while_another_turn_runs_does_not_touch_it(
    start: Start, client: httpx.AsyncClient, stores: Stores
) -> None:
    stalled, other = await start(), client.base_url
    late = send(stalled.url, "2 Late")
    turn_id = await turn_of(stores)
    stalled.signal(signal.SIGSTOP)
    try:
        running = send(other, "2 Other")
        await turn_of(stores, unlike=turn_id)
    finally:
        stalled.signal(signal.SIGCONT)
    assert (await late).json()["code"] == "turn_superseded"
    assert (await fields_of(stores, SESSION_ID))["turn"] not in ("", turn_id)
    assert (await running).json()["response"] == "Answer to 2 Other"


async def test_with_half_of_all_requests_cancelled_no_answer_is_foreign_and_nothing_is_doubled(
    start: Start, flush: Flush, rows: Rows
) -> None:
    pods = await asyncio.gather(start(), start())
    chance = random.Random(20230320)
    answered: set[str] = set()
    sent: set[str] = set()

    async def visitor(number: int) -> None:
        session_id = f"session_{number:04d}_of_the_storm"
        async with httpx.AsyncClient(timeout=40) as client:
            for count in range(MESSAGES):
                message = f"{chance.choice((0, 0.01, 0.03))} of {number}, number {count}"
                sent.add(message)
                url = f"{chance.choice(pods).url}/api/chat/shop/message"
                body = {"message": message, "session_id": session_id, "message_id": f"m{count}"}
                asked = asyncio.create_task(client.post(url, json=body))
                if chance.random() < 0.5:
                    await asyncio.wait({asked}, timeout=chance.uniform(0, 0.05))
                    asked.cancel()
                    await asyncio.wait({asked})
                    if chance.random() < 0.5:
                        continue
                    # A client that has lost its answer asks again.
                    asked = asyncio.create_task(client.post(url, json=body))
                response = await asked
                if response.status_code == 429:
                    # The turns of the cancelled requests wait too.
                    assert response.json()["code"] == "queue_full"
                    continue
                assert response.status_code == 200, response.text
                assert response.json()["response"] == f"Answer to {message}"
                assert response.json()["metadata"]["session_id"] == session_id
                answered.add(message)

    await asyncio.gather(*(visitor(number) for number in range(SESSIONS)))

    async def all_quiet() -> bool:
        async with httpx.AsyncClient() as client:
            texts = [(await client.get(f"{pod.url}/metrics")).text for pod in pods]
        return all("gateway_turns_running 0.0" in text for text in texts)

    await wait_for(all_quiet, "the turns that nobody waits for end")
    for pod in pods:
        async with httpx.AsyncClient() as client:
            assert "gateway_foreign_replies 0.0" in (await client.get(f"{pod.url}/metrics")).text
    await flush()
    found = await stored(rows)
    questions, answers = found[::2], found[1::2]
    assert answers == [f"Answer to {question}" for question in questions]
    assert [question for question, times in Counter(questions).items() if times > 1] == []
    assert answered <= set(questions) <= sent
    owners = await rows(
        "SELECT sessions.session_id, content FROM agent_messages AS messages"
        " JOIN agent_sessions AS sessions ON sessions.id = messages.session_id"
    )
    assert [row for row in owners if f"of {int(row[0].split('_')[1])}, " not in row[1]] == []
