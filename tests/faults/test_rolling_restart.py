"""Pods that are replaced one after the other under load: no turn that was answered is lost, and no new one refused."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any, Self

import httpx
import msgspec
import pytest

from gateway.app import Stores
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.support.haproxy import Haproxy, find_haproxy
from tests.support.pods import fields_of, gated_pod, gateway_process
from tests.support.serving import ROOT, GatewayProcess, wait_for
from tests.support.sse import SseParser, kinds, resume, speak, watch
from tests.support.visiting import Rows, new_session_id, post_message, problem

PROJECT = ROOT / "tests" / "data" / "project" / "langgraph.json"
PODS = 3
VISITORS = 16
WATCHED = 3
CHECK_MS = 200
NOTICE_S = 2
NEVER_S = 300
"""A notice, or a time between two checks, that no test lives to see the end of."""
PACES = (0, 0, 0.02, 0.1, 0.3, 1, 2.5)
"""Seconds that turns take; the longest outlast the notice."""

Start = Callable[..., Awaitable[GatewayProcess]]

needs_haproxy = pytest.mark.skipif(find_haproxy() is None, reason="haproxy is not installed")


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With a graph that takes as many seconds as a message begins with."""
    return msgspec.structs.replace(settings, graphs=str(PROJECT))


@pytest.fixture
async def start(settings: Settings, stores: Stores, put_agent: PutAgent, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a pod with this notice, and its drain time; its agent is `shop`."""
    await put_agent(graph="paced")
    async with AsyncExitStack() as stack:

        async def start(notice_s: float, drain_s: float = 20) -> GatewayProcess:
            environment = {
                "GATEWAY_GRAPHS": str(PROJECT),
                "GATEWAY_DRAIN_NOTICE_S": str(notice_s),
                "GATEWAY_DRAIN_S": str(drain_s),
            }
            return await stack.enter_async_context(gateway_process("serve", settings, tmp_path, **environment))

        yield start


def client_of(pod: GatewayProcess) -> httpx.AsyncClient:
    return httpx.AsyncClient(base_url=pod.url, timeout=40)


async def end_of(pod: GatewayProcess) -> int:
    """Waits for a pod that was told to go; its exit status."""
    return await asyncio.to_thread(pod.process.wait, 60)


async def is_unready(client: httpx.AsyncClient) -> bool:
    """Whether a pod says that it goes away."""
    answer = await client.get("/readyz")
    return answer.status_code == 503 and bool(answer.json()["draining"])


# -------------------------------------------------------------------------------------------------------- behind haproxy


class Visitors:
    """Load: each has a session and sends one message after the other, none of them twice; some sessions are watched by a
    second tab. `answered` is what each session was answered, in order; `refused` is every request that was not answered
    as it should be, at its first and only attempt; `seen` is what each tab was shown."""

    def __init__(self, url: str) -> None:
        self._client = httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None))
        self._visits: list[asyncio.Task[None]] = []
        self._tabs: list[asyncio.Task[None]] = []
        self._over = False
        self.answered: dict[str, list[str]] = {new_session_id(): [] for _ in range(VISITORS)}
        self.seen: dict[str, list[str]] = {session_id: [] for session_id in list(self.answered)[:WATCHED]}
        self.refused: list[str] = []

    async def __aenter__(self) -> Self:
        self._visits = [asyncio.create_task(self._visit(session_id)) for session_id in self.answered]
        await self.all_went_on()
        self._tabs = [asyncio.create_task(self._watch(session_id)) for session_id in self.seen]
        await wait_for(lambda: self.refused or all(self.seen.values()), "the second tabs see something")
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in (*self._visits, *self._tabs):
            task.cancel()
        await asyncio.gather(*self._visits, *self._tabs, return_exceptions=True)
        await self._client.aclose()

    async def all_went_on(self) -> None:
        """Waits until every visitor has got another answer, or somebody was refused."""
        before = {session_id: len(answered) for session_id, answered in self.answered.items()}
        await wait_for(
            lambda: self.refused or all(len(self.answered[one]) > count for one, count in before.items()),
            "every visitor gets an answer",
            30,
        )

    async def leave(self) -> None:
        """Waits for the last answers, and until the tabs have seen them."""
        self._over = True
        await asyncio.gather(*self._visits)

        def seen() -> bool:
            return all(self.answered[one][-1:] == shown[-1:] for one, shown in self.seen.items())

        await wait_for(lambda: self.refused or seen(), "the second tabs see the last answers")

    async def _visit(self, session_id: str) -> None:
        chance = random.Random(session_id)
        number = 0
        while not self._over:
            number += 1
            message = f"{chance.choice(PACES)} Message {number}"
            call = "stream" if chance.random() < 0.3 else "message"
            try:
                answer = await self._client.post(
                    f"/api/chat/shop/{call}", json={"message": message, "session_id": session_id}
                )
            except httpx.TransportError as error:
                self.refused.append(repr(error))
                continue
            if answer_in(answer) == f"Answer to {message}":
                self.answered[session_id].append(message)
            else:
                self.refused.append(f"{answer.status_code} {answer.text}")

    async def _watch(self, session_id: str) -> None:
        """As a browser's EventSource: connects again, behind what it has seen, whenever the stream ends."""
        cursor = None
        while True:
            try:
                async with watch(self._client, session_id, cursor) as stream:
                    while event := await stream.next():
                        cursor = stream.cursor
                        if event.kind == "turn.completed":
                            self.seen[session_id].append(event.data["response"].removeprefix("Answer to "))
            except (httpx.TransportError, AssertionError) as error:
                self.refused.append(f"second tab: {error!r}")
                return


def answer_in(answer: httpx.Response) -> str:
    """The text of an answer, streamed or not; empty when it is none."""
    if answer.status_code != 200:
        return ""
    if answer.headers["content-type"].startswith("text/event-stream"):
        last = SseParser().feed(answer.content)[-1]
        return str(last.data["response"]) if last.kind == "turn.completed" else ""
    return str(answer.json()["response"])


@asynccontextmanager
async def balanced(pods: Sequence[GatewayProcess], directory: Path, check_ms: int) -> AsyncIterator[Haproxy]:
    """A balancer that sends its requests to all of these pods."""
    balancer = Haproxy(directory, [pod.port for pod in pods], check_ms=check_ms)
    try:
        await asyncio.to_thread(balancer.start)
        yield balancer
    finally:
        await asyncio.to_thread(balancer.stop)


@needs_haproxy
async def test_three_pods_are_replaced_one_by_one_and_nobody_is_refused_or_forgotten(
    start: Start, settings: Settings, stores: Stores, rows: Rows, tmp_path: Path
) -> None:
    pods = await asyncio.gather(*(start(NOTICE_S) for _ in range(PODS)))
    async with (
        gateway_process("worker", settings, tmp_path) as worker,
        balanced(pods, tmp_path / "haproxy", CHECK_MS) as balancer,
    ):
        async with Visitors(balancer.url) as visitors:
            for pod in pods:
                await wait_for(lambda pod=pod: balancer.state(pod.port) == "UP", "the balancer has the pod")
                await visitors.all_went_on()
                pod.signal(signal.SIGTERM)
                assert await end_of(pod) == 0, pod.output()
                await visitors.all_went_on()
                await pod.start()
                await wait_for(lambda pod=pod: balancer.state(pod.port) == "UP", "the balancer has the pod again")
            await visitors.all_went_on()
            await visitors.leave()
        assert visitors.refused == []

        async def all_flushed() -> bool:
            return int(await stores.client.xlen(stores.keys.outbox(0))) == 0

        await wait_for(all_flushed, "all answers are in Postgres")
        assert worker.stop() == 0
    found: dict[str, list[str]] = {session_id: [] for session_id in visitors.answered}
    for session_id, content in await rows(
        "SELECT sessions.session_id, content FROM agent_messages AS messages"
        " JOIN agent_sessions AS sessions ON sessions.id = messages.session_id ORDER BY seq"
    ):
        found[session_id].append(content)
    for session_id, answered in visitors.answered.items():
        assert found[session_id] == [said for message in answered for said in (message, f"Answer to {message}")]
    for session_id, seen in visitors.seen.items():
        # From where the tab was opened, without a gap and without anything twice.
        assert seen == visitors.answered[session_id][-len(seen) :]
    for pod in pods:
        lives = pod.output().split('"pod.started"')[1:]
        assert len(lives) == 2
        assert all('"turn.completed"' in life for life in lives), "each pod had visitors, before and after"
        assert "Traceback" not in pod.output()


@needs_haproxy
async def test_control_without_notice_the_balancer_sends_visitors_to_a_pod_that_is_gone(
    start: Start, tmp_path: Path
) -> None:
    """And one that looks so seldom that it never notices goes on doing so."""
    pods = await asyncio.gather(*(start(0) for _ in range(PODS)))
    async with (
        balanced(pods, tmp_path / "haproxy", NEVER_S * 1000) as balancer,
        Visitors(balancer.url) as visitors,
    ):
        assert visitors.refused == []
        pods[0].signal(signal.SIGTERM)
        assert await end_of(pods[0]) == 0, pods[0].output()
        await wait_for(lambda: visitors.refused, "a visitor is refused")


# ------------------------------------------------------------------------------------------------------ the steps of a drain


@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
async def test_readiness_fails_first_and_all_else_goes_on_until_a_second_signal(
    start: Start, second: signal.Signals
) -> None:
    pod, session_id = await start(NEVER_S), new_session_id()
    async with client_of(pod) as kept, client_of(pod) as client:
        before = await post_message(kept, session_id, "0 Before")
        assert (before.status_code, before.headers.get("connection")) == (200, None)
        async with watch(kept, session_id) as opened_before:
            pod.signal(signal.SIGTERM)
            await wait_for(lambda: is_unready(client), "the pod is not ready")

            async def is_asked_to_leave() -> bool:
                answer = await post_message(kept, session_id, "0 During")
                assert answer.status_code == 200, answer.text
                return "close" in answer.headers.get("connection", "")

            await wait_for(is_asked_to_leave, "who keeps a connection open is asked to make another")
            async with watch(client, session_id) as opened_after, speak(client, session_id, "0 Last") as stream:
                assert kinds(await stream.rest())[-1] == "turn.completed"
                while (await opened_before.until("turn.completed")).data["response"] != "Answer to 0 Last":
                    pass
                assert (await opened_after.until("turn.completed")).data["response"] == "Answer to 0 Last"
                pod.signal(second)
                assert await opened_before.rest() == await opened_after.rest() == []
        assert await end_of(pod) == 0
        assert "Traceback" not in pod.output()


async def test_an_interrupted_pod_gives_no_notice(start: Start) -> None:
    pod = await start(NEVER_S)
    pod.signal(signal.SIGINT)
    assert await end_of(pod) == 0


async def test_control_without_notice_a_pod_refuses_while_it_still_has_turns(start: Start, stores: Stores) -> None:
    pod, session_id = await start(0), new_session_id()
    async with client_of(pod) as client, client_of(pod) as other:
        running = asyncio.create_task(post_message(client, session_id, "3 Running"))
        await wait_for(lambda: turn_of(stores, session_id), "the turn runs")
        pod.signal(signal.SIGTERM)

        async def is_refused() -> bool:
            try:
                return (await post_message(other, new_session_id(), "0 New")).status_code == 503
            except httpx.TransportError:
                return True

        await wait_for(is_refused, "a new turn is refused")
        assert (await running).json()["response"] == "Answer to 3 Running"
        assert await end_of(pod) == 0


async def turn_of(stores: Stores, session_id: str) -> str:
    return (await fields_of(stores, session_id)).get("turn", "")


async def has_waiters(stores: Stores, session_id: str, count: int) -> bool:
    return len((await fields_of(stores, session_id)).get("waiting", "").split()) == count


async def held(stores: Stores, session_id: str) -> tuple[str, str, int]:
    """What of the session is held by a turn: its lease, the turns that wait, its place among those that run."""
    fields = await fields_of(stores, session_id)
    return fields["turn"], fields["waiting"], await stores.client.zcard(stores.keys.running(0))


async def test_turns_that_outlast_the_drain_let_their_sessions_go_with_all_who_wait(start: Start, stores: Stores) -> None:
    pod, session_id, streamed = await start(0, drain_s=1), new_session_id(), new_session_id()
    async with client_of(pod) as client, speak(client, streamed, "60 Streamed") as stream:
        await stream.take(1)
        running = asyncio.create_task(post_message(client, session_id, "60 Running"))
        await wait_for(lambda: turn_of(stores, session_id), "the turn runs")
        waiting = [asyncio.create_task(post_message(client, session_id, f"0 Waiting {n}")) for n in range(2)]
        await wait_for(lambda: has_waiters(stores, session_id, 2), "the others wait")
        pod.signal(signal.SIGTERM)
        assert await end_of(pod) == 0
        for one in (session_id, streamed):
            assert await held(stores, one) == ("", "", 0)
        for answer in await asyncio.gather(running, *waiting):
            problem(answer, 503, "draining")
        ended = await stream.rest()
        assert [(event.kind, event.data["code"], event.data["retryable"]) for event in ended] == [
            ("turn.failed", "draining", True)
        ]


async def test_control_without_the_abort_leases_and_waiters_are_left_behind(
    settings: Settings, stores: Stores, put_agent: PutAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def keep(*_: Any) -> bool:
        return True

    session_id = new_session_id()
    await put_agent(graph="gated")
    async with gated_pod(settings) as served:
        running = served.send("Running", session_id)
        await served.gated.has_started("Running")
        waiting = served.send("Waiting", session_id)
        await wait_for(lambda: has_waiters(stores, session_id, 1), "the other waits")
        monkeypatch.setattr(served.stores.sessions, "abort", keep)
        await served.pod.turns.drain(0)
        for answer in await asyncio.gather(running, waiting):
            problem(answer, 503, "draining")
        turn, waiters, places = await held(stores, session_id)
        assert (bool(turn), len(waiters.split()), places) == (True, 1, 1)


async def test_a_turn_that_waits_on_a_pod_that_leaves_is_answered_when_there_is_time(
    start: Start, client: httpx.AsyncClient, stores: Stores
) -> None:
    pod, session_id = await start(0), new_session_id()
    async with client_of(pod) as leaving:
        running = asyncio.create_task(post_message(client, session_id, "2 Running elsewhere"))
        await wait_for(lambda: turn_of(stores, session_id), "the turn runs")
        waiting = asyncio.create_task(post_message(leaving, session_id, "0 Waiting"))
        await wait_for(lambda: has_waiters(stores, session_id, 1), "the other waits")
        pod.signal(signal.SIGTERM)
        assert await end_of(pod) == 0
        assert (await running).json()["response"] == "Answer to 2 Running elsewhere"
        assert (await waiting).json()["metadata"]["history"] == 2


async def test_who_follows_another_pods_turn_is_sent_elsewhere_and_misses_nothing(
    start: Start, client: httpx.AsyncClient
) -> None:
    """Long before that turn ends, and with the exit status of a pod that had nothing to abort."""
    pod, session_id = await start(0), new_session_id()
    async with speak(client, session_id, "3 Running elsewhere") as stream, client_of(pod) as leaving:
        (started,) = await stream.take(1)
        async with resume(leaving, session_id, started.data["turn_id"]) as follower:
            assert await follower.take(1) == [started]
            pod.signal(signal.SIGTERM)
            assert await follower.rest() == []
        assert await end_of(pod) == 0
        assert "Traceback" not in pod.output()
        async with resume(client, session_id, started.data["turn_id"], follower.cursor) as follower:
            assert await follower.rest() == await stream.rest()
