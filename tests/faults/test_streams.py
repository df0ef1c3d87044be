"""Streams when something breaks: connections cut anywhere, pods killed or paused, Redis restarted, wake-ups lost."""

import asyncio
import random
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from itertools import chain
from pathlib import Path
from time import monotonic
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio

from gateway.app import Stores
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from gateway.streams.events import TERMINAL
from persistence.model.agents import AgentDefinition
from persistence.redis.linking import link_scripts
from tests.conftest import PutAgent
from tests.support.balancer import Balancer, balancer_before
from tests.support.pods import rewrite
from tests.support.serving import GatewayProcess, wait_for
from tests.support.spoken import Spoken, SpokenPod, new_session_id, spoken_pod, stored_events
from tests.support.sse import Event, check_whole, kinds, resume, speak, text_of, watch

LEASE_S = 2
NOISE_S = 4
"""How much longer than the lease a busy machine may take; promised are 2 s."""


class Processes:
    """Two pods that stay, and how to start one that will not."""

    def __init__(self, settings: dict[str, str], directory: Path) -> None:
        self._settings = settings
        self._directory = directory
        self.pods: list[GatewayProcess] = []

    async def start(self, **changes: str) -> GatewayProcess:
        pod = GatewayProcess("serve", self._directory, self._settings | changes)
        self.pods.append(pod)
        return await pod.start()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def processes(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Processes]:
    """Pods as processes, two to begin with."""
    environment = {
        "GATEWAY_REDIS_URL": redis_server.url,
        "GATEWAY_DATABASE_URL": postgres_server.url,
        "GATEWAY_ADDRESS_RATE_LIMIT": "off",
        "GATEWAY_ADDRESS_SESSION_LIMIT": "off",
        "GATEWAY_LEASE_S": str(LEASE_S),
    }
    found = Processes(environment, tmp_path_factory.mktemp("pods"))
    await asyncio.gather(found.start(), found.start())
    yield found
    for pod in found.pods:
        if pod.process.poll() is None:
            pod.kill()


@pytest.fixture
async def clients(processes: Processes, stores: Stores) -> AsyncIterator[list[httpx.AsyncClient]]:
    """Clients of the two pods that stay."""
    async with AsyncExitStack() as stack:
        yield [
            await stack.enter_async_context(httpx.AsyncClient(base_url=pod.url, timeout=40)) for pod in processes.pods[:2]
        ]


@pytest.fixture
async def balancer(processes: Processes) -> AsyncIterator[Balancer]:
    async with balancer_before(*(pod.port for pod in processes.pods[:2])) as balancer:
        yield balancer


@pytest.fixture
def spoken() -> Spoken:
    return Spoken()


# ------------------------------------------------------------------------------------------------ connections cut anywhere


class Journey:
    """One turn, read through the balancer over as many connections as it takes."""

    def __init__(
        self, client: httpx.AsyncClient, balancer: Balancer, agent: str, session_id: str, cuts: list[tuple[str, int]]
    ) -> None:
        self._client = client
        self._balancer = balancer
        self._agent = agent
        self._session_id = session_id
        self._cuts = list(cuts)
        self.events: list[Event] = []
        self.pods: list[int] = []

    async def run(self) -> None:
        """Reads to the terminal event; each connection but the last is cut as `cuts` says."""
        while not self.events or self.events[-1].kind not in TERMINAL:
            assert len(self.pods) < 10, f"too many connections: {self.events}"
            what, where = self._cuts.pop(0) if self._cuts else ("none", 0)
            await self._read(where if what == "bytes" else None, where if what == "events" else None)

    async def _read(self, cut_bytes: int | None, cut_events: int | None) -> None:
        client = self._client
        if not self.events:
            opened = speak(
                client, self._session_id, "Tell me something", agent=self._agent, message_id="m-1", cut_after=cut_bytes
            )
        else:
            turn_id, cursor = self.events[0].data["turn_id"], self.events[-1].id
            opened = resume(client, self._session_id, turn_id, cursor, agent=self._agent, cut_after=cut_bytes)
        async with opened as stream:
            own_port = stream.response.extensions["network_stream"].get_extra_info("client_addr")[1]
            self.pods.append(self._balancer.went_to[own_port])
            for event in await (stream.rest() if cut_events is None else stream.take(cut_events)):
                # As a client does who is told that its log is gone.
                self.events = [] if event.kind == "log.reset" else [*self.events, event]


async def journeys(balancer: Balancer, agent: str, plans: list[list[tuple[str, int]]]) -> list[Journey]:
    """Many journeys, twenty at a time."""
    free = asyncio.Semaphore(20)

    # Nothing is kept alive: every request has a connection of its own.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with httpx.AsyncClient(base_url=balancer.url, timeout=40, limits=limits) as client:

        async def one(cuts: list[tuple[str, int]]) -> Journey:
            journey = Journey(client, balancer, agent, new_session_id(), cuts)
            async with free:
                await journey.run()
            return journey

        return await asyncio.gather(*map(one, plans))


async def test_a_stream_cut_anywhere_goes_on_at_the_other_pod(
    clients: list[httpx.AsyncClient], balancer: Balancer, put_agent: PutAgent
) -> None:
    """200 streams: cut at every event boundary and at random bytes, up to three times each."""
    await put_agent("cut", config={"chunks": 8, "delay_ms": 120})
    async with speak(clients[0], new_session_id(), "Tell me something", agent="cut") as stream:
        uncut = await stream.rest()
    check_whole(uncut)
    chance = random.Random(42)
    plans = [[("events", 1 + n % len(uncut))] for n in range(80)]
    plans += [[("bytes", chance.randrange(1, stream.size))] for _ in range(70)]
    plans += [
        [(what, chance.randrange(1, 3 if what == "events" else 400)) for what in chance.choices(["events", "bytes"], k=3)]
        for _ in range(50)
    ]
    done = await journeys(balancer, "cut", plans)
    exact = 0
    for journey in done:
        # A message that is sent again after its turn has ended is answered from the transcript, in numbers of its own.
        check_whole(journey.events, journey.events[0].n)
        assert text_of(journey.events) == text_of(uncut) == uncut[-1].data["response"]
        exact += 1
    assert exact == 200
    moved = sum(len(set(journey.pods)) > 1 for journey in done)
    assert moved > 60, f"only {moved} streams were resumed at the other pod"


async def test_control_without_its_first_number_a_log_is_resumed_wrongly(
    settings: Settings, stores: Stores, spoken: Spoken, put_agent: PutAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A log whose parts are numbered from 1 again and again."""
    await put_agent("shop", graph="spoken")
    async with spoken_pod(settings, spoken) as pod, spoken_pod(settings, spoken) as other:
        session_id = new_session_id()
        numbered = "'first', args.first"
        for name in [name for name, script in link_scripts().items() if numbered in script.text]:
            rewrite(pod.stores.scripts, name, lambda text: text.replace(numbered, "'first', '1'"))
        async with speak(pod.client, session_id, "Hello") as stream:
            for piece in ("one ", "two "):
                spoken.say("Hello", piece)
                await stream.until("text.delta")
                turn_id = stream.events[0].data["turn_id"]
                await stored_events(stores, session_id, turn_id, len(stream.events))
            spoken.end("Hello")
            await stream.rest()
        async with resume(other.client, session_id, turn_id) as late:
            assert await late.rest() != stream.events


# ------------------------------------------------------------------------------------------------------ a pod dies or stalls


async def test_when_its_pod_is_killed_a_turn_ends_for_those_who_resume_it(
    processes: Processes, clients: list[httpx.AsyncClient], put_agent: PutAgent, stores: Stores
) -> None:
    await put_agent("long", config={"chunks": 3000, "delay_ms": 60_000})
    victim = await processes.start()
    session_id = new_session_id()
    message = "A long story. " * 300
    async with AsyncExitStack() as stack:
        client = await stack.enter_async_context(httpx.AsyncClient(base_url=victim.url, timeout=40))
        dying = await stack.enter_async_context(speak(client, session_id, message, agent="long"))
        turn_id = (await dying.take(5))[0].data["turn_id"]
        await stored_events(stores, session_id, turn_id, 5)
        before = await stack.enter_async_context(resume(clients[0], session_id, turn_id, dying.events[1].id, agent="long"))
        tab = await stack.enter_async_context(watch(clients[1], session_id))
        assert await before.take(3) == dying.events[2:]
        await tab.take(5)
        victim.kill()
        killed = monotonic()
        await dying.rest()
        after = await stack.enter_async_context(resume(clients[1], session_id, turn_id, dying.cursor, agent="long"))
        for reader in (before, after, tab):
            events = await reader.rest() if reader is not tab else [await tab.until("turn.failed")]
            assert events[-1][1:] == (
                "turn.failed",
                {"code": "turn_lost", "title": "The turn ended without an answer", "retryable": True},
            )
            assert monotonic() - killed < LEASE_S + NOISE_S
        check_whole([*dying.events[:2], *before.events])
    # The session is free again.
    async with speak(clients[0], session_id, "And now?", agent="long") as stream:
        assert (await stream.take(1))[0].kind == "turn.started"
    assert (await clients[1].post("/api/chat/long/cancel", json={"session_id": session_id})).status_code == 202


async def test_a_paused_pod_that_wakes_up_commits_nothing(
    processes: Processes, clients: list[httpx.AsyncClient], put_agent: PutAgent
) -> None:
    """Two pauses with 25 sessions each: fifty rounds."""
    await put_agent("slow", config={"chunks": 4, "delay_ms": 1500})
    sleeper = await processes.start(GATEWAY_LEASE_S="1")
    async with httpx.AsyncClient(base_url=sleeper.url, timeout=40) as client:
        for _ in range(2):
            sessions = [new_session_id() for _ in range(25)]
            async with AsyncExitStack() as stack:
                old = [
                    await stack.enter_async_context(speak(client, session_id, "Old", agent="slow"))
                    for session_id in sessions
                ]
                await asyncio.gather(*(stream.take(1) for stream in old))
                sleeper.signal(signal.SIGSTOP)
                try:
                    bodies = [{"message": "New", "session_id": session_id} for session_id in sessions]
                    answers = await asyncio.gather(*(clients[0].post("/api/chat/slow/message", json=b) for b in bodies))
                finally:
                    sleeper.signal(signal.SIGCONT)
                assert [answer.status_code for answer in answers] == [200] * 25
                assert {answer.json()["metadata"]["message_count"] for answer in answers} == {2}
                for stream in old:
                    await stream.rest()
                    assert stream.events[-1].kind == "turn.failed"
                    assert stream.events[-1].data["retryable"]
            for session_id, stream in zip(sessions, old, strict=True):
                messages = (await clients[1].get(f"/api/sessions/{session_id}/messages")).json()["messages"]
                assert [message["content"] for message in messages] == ["New", "You said: New"]
                turn_id = stream.events[0].data["turn_id"]
                async with resume(clients[1], session_id, turn_id, stream.events[0].id, agent="slow") as late:
                    assert kinds(await late.rest())[-1] == "turn.failed"


async def test_watchers_are_sent_away_when_their_pod_stops(
    processes: Processes, clients: list[httpx.AsyncClient], put_agent: PutAgent
) -> None:
    await put_agent("brief")
    leaving = await processes.start()
    session_id = new_session_id()
    async with speak(clients[0], session_id, "Hello", agent="brief") as stream:
        await stream.rest()
    async with httpx.AsyncClient(base_url=leaving.url, timeout=40) as client, watch(client, session_id) as tab:
        async with speak(clients[0], session_id, "Again", agent="brief") as stream:
            await stream.rest()
        assert await tab.take(3) == stream.events
        stopping = asyncio.create_task(asyncio.to_thread(leaving.stop))
        assert await tab.rest() == []
        assert await stopping == 0


# ------------------------------------------------------------------------------------------------------------------- Redis


async def test_a_restart_of_redis_is_not_seen_in_a_stream(
    tmp_path: Path, settings: Settings, empty: None, spoken: Spoken
) -> None:
    with RedisServer(tmp_path, free_port(), config={"appendfsync": "always"}) as redis:
        settings = msgspec.structs.replace(settings, redis_url=redis.url)
        async with AsyncExitStack() as stack:
            pods = [await stack.enter_async_context(spoken_pod(settings, spoken)) for _ in range(2)]
            await put_shop(pods[0])
            session_id = new_session_id()
            async with speak(pods[0].client, session_id, "Hello") as stream:
                spoken.say("Hello", "before ")
                turn_id = (await stream.take(2))[0].data["turn_id"]
                follower = await stack.enter_async_context(resume(pods[1].client, session_id, turn_id))
                await follower.take(2)
                await asyncio.to_thread(redis.stop)
                spoken.say("Hello", "meanwhile ")
                assert (await stream.take(1))[0].data == {"text": "meanwhile "}
                await asyncio.to_thread(redis.start)
                spoken.say("Hello", "after ")
                assert (await stream.take(1))[0].data == {"text": "after "}
                spoken.end("Hello")
                await stream.rest()
            check_whole(stream.events)
            assert text_of(stream.events) == "before meanwhile after " == stream.events[-1].data["response"]
            await follower.rest()
            assert follower.events == stream.events
            for pod in pods:
                for seen in (0, 1, 3):
                    async with resume(pod.client, session_id, turn_id, f"{stream.events[0].epoch}-{seen}") as late:
                        assert await late.rest() == stream.events[seen:]
                answer = await pod.client.get(f"/api/sessions/{session_id}/messages")
                assert len(answer.json()["messages"]) == 2
            await stack.aclose()


async def put_shop(pod: SpokenPod) -> None:
    """The agent `shop` in a Redis of its own."""
    await pod.stores.agents.put("shop", AgentDefinition(graph="spoken", rate_limit=None))


async def test_a_log_that_redis_lost_in_part_is_written_again(
    settings: Settings, stores: Stores, spoken: Spoken, put_agent: PutAgent
) -> None:
    """What `appendfsync everysec` can lose: the last entries, or all of them."""
    await put_agent("shop", graph="spoken")
    async with AsyncExitStack() as stack:
        pods = [await stack.enter_async_context(spoken_pod(settings, spoken)) for _ in range(2)]
        session_id = new_session_id()
        async with speak(pods[0].client, session_id, "Hello") as stream:
            turn_id = (await stream.take(1))[0].data["turn_id"]
            key = stores.keys.events(session_id, turn_id)
            for n, lost in enumerate(("last", "all", "last"), 1):
                spoken.say("Hello", f"{n}a ")
                await stream.take(1)
                await stored_events(stores, session_id, turn_id, len(stream.events))
                if lost == "all":
                    await stores.client.delete(key)
                else:
                    await forget_newest(stores, key)
                spoken.say("Hello", f"{n}b ")
                await stream.take(1)
                await stored_events(stores, session_id, turn_id, len(stream.events))
                async with resume(pods[1].client, session_id, turn_id) as late:
                    assert await late.take(len(stream.events)) == stream.events
            spoken.end("Hello")
            await stream.rest()
        check_whole(stream.events)
        async with resume(pods[1].client, session_id, turn_id, stream.events[2].id) as late:
            assert await late.rest() == stream.events[3:]


async def forget_newest(stores: Stores, key: str) -> None:
    """Leaves a log as it was before its newest entry. XDEL would leave the stream knowing of it."""
    entries = await stores.client.execute_command("XRANGE", key, "-", "+")
    await stores.client.delete(key)
    for entry, fields in entries[:-1]:
        await stores.client.execute_command("XADD", key, entry, *chain.from_iterable(fields.items()))


async def test_control_without_gap_detection_what_redis_lost_is_missing(
    settings: Settings, stores: Stores, spoken: Spoken, put_agent: PutAgent
) -> None:
    await put_agent("shop", graph="spoken")
    async with AsyncExitStack() as stack:
        pods = [await stack.enter_async_context(spoken_pod(settings, spoken)) for _ in range(2)]
        guard = "if tail ~= tonumber(args.after) then return reply('gap', tail) end"
        rewrite(pods[0].stores.scripts, "append", lambda text: text.replace(guard, ""))
        session_id = new_session_id()
        async with speak(pods[0].client, session_id, "Hello") as stream:
            turn_id = (await stream.take(1))[0].data["turn_id"]
            spoken.say("Hello", "lost ")
            await stream.take(1)
            await stored_events(stores, session_id, turn_id, 2)
            await stores.client.delete(stores.keys.events(session_id, turn_id))
            spoken.say("Hello", "kept ")
            await stream.take(1)
            await stored_events(stores, session_id, turn_id, 3)
            async with resume(pods[1].client, session_id, turn_id) as late:
                assert await late.take(2) != stream.events[:2]
            spoken.end("Hello")
            await stream.rest()


async def listeners(stores: Stores) -> int:
    """How many pods could be told to stop a turn."""
    found = await stores.client.execute_command("PUBSUB", "NUMSUB", stores.keys.control)
    return int(found[1])


async def test_a_lost_subscription_loses_nothing(
    settings: Settings, stores: Stores, spoken: Spoken, put_agent: PutAgent
) -> None:
    await put_agent("shop", graph="spoken")
    async with AsyncExitStack() as stack:
        pods = [await stack.enter_async_context(spoken_pod(settings, spoken)) for _ in range(2)]
        # Those of the processes that other tests here use are among them.
        listening = await listeners(stores)
        session_id = new_session_id()
        async with speak(pods[0].client, session_id, "Hello") as stream:
            turn_id = (await stream.take(1))[0].data["turn_id"]
            follower = await stack.enter_async_context(resume(pods[1].client, session_id, turn_id))
            tab = await stack.enter_async_context(watch(pods[1].client, session_id))
            for n in range(20):
                await stores.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
                spoken.say("Hello", f"{n} ")
                await stream.take(1)
            await follower.take(21)
            await stores.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
            spoken.end("Hello")
            await stream.rest()
            await follower.rest()
            await tab.until("turn.completed")
            assert stream.events == follower.events == tab.events
        await stores.client.execute_command("CLIENT", "KILL", "TYPE", "pubsub")
        spoken.end("Again")
        async with speak(pods[0].client, session_id, "Again") as stream:
            await stream.rest()
        assert await tab.take(3) == stream.events

        async def all_listen() -> bool:
            return await listeners(stores) == listening

        await wait_for(all_listen, "the pods listen again")
        # And a pod that listens again can be told to stop a turn.
        async with speak(pods[0].client, session_id, "Stop") as stream:
            await stream.take(1)
            assert (await pods[1].cancel(session_id)).status_code == 202
            assert kinds(await stream.rest()) == ["turn.cancelled"]
        await stack.aclose()


async def test_a_follower_outlives_a_redis_that_is_away(
    tmp_path: Path, settings: Settings, empty: None, spoken: Spoken
) -> None:
    """And one that is away for longer than anybody would wait ends the stream with a word, not with silence."""
    with RedisServer(tmp_path, free_port()) as redis:
        settings = msgspec.structs.replace(settings, redis_url=redis.url, drain_s=0)
        async with AsyncExitStack() as stack:
            pods = [await stack.enter_async_context(spoken_pod(settings, spoken)) for _ in range(2)]
            pods[1].tune(give_up_s=0.5)
            await put_shop(pods[0])
            session_id = new_session_id()
            async with speak(pods[0].client, session_id, "Hello") as stream:
                turn_id = (await stream.take(1))[0].data["turn_id"]
                async with resume(pods[1].client, session_id, turn_id) as follower:
                    await follower.take(1)
                    await asyncio.to_thread(redis.stop)
                    assert kinds(await follower.rest()) == ["turn.failed"]
                    assert follower.events[-1].data["retryable"]
                spoken.end("Hello")
                await stream.rest()
                assert stream.events[-1][1:] == (
                    "turn.failed",
                    {
                        "code": "redis_unavailable",
                        "title": "Sessions cannot be reached just now",
                        "retryable": True,
                    },
                )
            await stack.aclose()


# -------------------------------------------------------------------------------------------------------- all at once


@pytest.mark.parametrize("if_busy", ["queue", "reject"])
async def test_ten_messages_at_once_are_answered_in_order_or_refused(
    settings: Settings, stores: Stores, spoken: Spoken, put_agent: PutAgent, if_busy: str
) -> None:
    await put_agent("shop", graph="spoken")
    async with AsyncExitStack() as stack:
        pods = [await stack.enter_async_context(spoken_pod(settings, spoken)) for _ in range(2)]
        session_id = new_session_id()
        spoken.end("Open")
        assert (await pods[0].ask("Open", session_id)).status_code == 200
        messages = [f"Message {n}" for n in range(10)]
        calls = [
            asyncio.create_task(say(pods[n % 2], "stream" if n % 3 else "message", session_id, message, if_busy))
            for n, message in enumerate(messages)
        ]
        left = 4 if if_busy == "queue" else 1

        async def refused() -> bool:
            return sum(call.done() for call in calls) == 10 - left

        await wait_for(refused, "whoever is refused has been told")
        order: list[str] = []
        if if_busy == "queue":
            field = await stores.client.execute_command("HGET", stores.keys.session(session_id), "waiting")
            order = [waiter.split("@")[0] for waiter in field.decode().split()]
            assert len(order) == 3
        spoken.end(*messages)
        answers = await asyncio.gather(*calls)
        told = [answer for answer in answers if isinstance(answer, httpx.Response)]
        answered = [answer for answer in answers if isinstance(answer, dict)]
        assert len(answered) == left
        for answer in told:
            expected = (429, "queue_full") if if_busy == "queue" else (409, "turn_in_progress")
            assert (answer.status_code, answer.json()["code"]) == expected
            assert int(answer.headers["retry-after"]) >= 1
        answered.sort(key=lambda metadata: metadata["message_count"])
        assert [metadata["message_count"] for metadata in answered] == [4 + 2 * n for n in range(left)]
        assert [metadata["turn_id"] for metadata in answered][1:] == order
        assert len(spoken.started) == left + 1


async def say(pod: SpokenPod, call: str, session_id: str, message: str, if_busy: str) -> httpx.Response | dict[str, Any]:
    """Has a message answered; the metadata of the answer, or the refusal."""
    body = {"message": message, "session_id": session_id, "if_busy": if_busy}
    if call == "message":
        answer = await pod.client.post("/api/chat/shop/message", json=body)
        return answer if answer.status_code != 200 else dict(answer.json()["metadata"])
    answer = await pod.client.post("/api/chat/shop/stream", json=body)
    if answer.status_code != 200:
        return answer
    completed = answer.text.rpartition("data: ")[2]
    found: dict[str, Any] = msgspec.json.decode(completed)["metadata"]
    return found
