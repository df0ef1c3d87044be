"""What streaming costs, counted and not timed: writes to Redis, connections, memory."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from time import monotonic, time
from typing import Any

import httpx
import jwt
import msgspec
import pytest

from gateway.app import Stores
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from persistence.model.agents import AgentDefinition, RateLimit
from tests.conftest import PutAgent
from tests.support.pods import gated_pod
from tests.support.serving import GatewayProcess, wait_for
from tests.support.spoken import Spoken, SpokenPod, new_session_id, spoken_pod
from tests.support.sse import open_stream, speak, text_of, watch

IDLE = 500
TOKENS = 2_000


@pytest.fixture
async def pod(tmp_path: Path, settings: Settings, empty: None) -> AsyncIterator[SpokenPod]:
    """A pod on a Redis that nobody else talks to, with the agents `shop` (spoken) and `quiet` (echo)."""
    with RedisServer(tmp_path, free_port()) as redis:
        spoken = Spoken()
        async with spoken_pod(msgspec.structs.replace(settings, redis_url=redis.url), spoken) as pod:
            for name, graph in (("shop", "spoken"), ("quiet", "echo")):
                await pod.stores.agents.put(name, AgentDefinition(graph=graph, rate_limit=None))
            yield pod


async def calls(stores: Stores, *commands: str) -> int:
    """How often these commands were called, from within scripts too."""
    found: dict[str, Any] = await stores.client.execute_command("INFO", "commandstats")
    return sum(int(found.get(f"cmdstat_{command}", {"calls": 0})["calls"]) for command in commands)


async def test_a_turn_of_2000_tokens_in_a_second_makes_at_most_60_writes(pod: SpokenPod) -> None:
    spoken = pod.spoken
    session_id = new_session_id()
    spoken.end("Hello")
    assert (await pod.ask("Hello", session_id)).status_code == 200
    before = await calls(pod.stores, "evalsha", "eval"), await calls(pod.stores, "xadd")
    async with speak(pod.client, session_id, "Tell me") as stream:
        started, said = monotonic(), 0
        while said < TOKENS:
            due = min(TOKENS, int((monotonic() - started) * TOKENS) + 1)
            spoken.say("Tell me", *[f"{n} " for n in range(said, due)])
            said = due
            await asyncio.sleep(0.002)
        spoken.end("Tell me")
        await stream.rest()
        took_s = monotonic() - started
    scripts, written = await calls(pod.stores, "evalsha", "eval") - before[0], await calls(pod.stores, "xadd") - before[1]
    assert text_of(stream.events) == "".join(f"{n} " for n in range(TOKENS))
    assert len(stream.events) == TOKENS + 2
    # On a machine that is busy with other things it takes longer than a second, and writes go on meanwhile.
    allowed = 60 * max(1.0, took_s / 1.2)
    assert scripts <= allowed, f"{scripts} script calls in {took_s:.2f} s"
    # One of them is the record on the outbox.
    assert written - 1 <= allowed, f"{written} entries in {took_s:.2f} s"
    assert written > 2, "nothing was written before the end"


async def test_a_turn_shorter_than_40_ms_costs_no_extra_round_trip(pod: SpokenPod) -> None:
    pod.tune(coalesce_s=10.0)
    session_id = new_session_id()
    for call in ("message", "stream"):
        body = {"message": "Hello", "session_id": session_id}
        assert (await pod.client.post("/api/chat/quiet/message", json=body)).status_code == 200
        before = await calls(pod.stores, "evalsha", "eval")
        if call == "message":
            assert (await pod.client.post("/api/chat/quiet/message", json=body)).status_code == 200
        else:
            async with open_stream(pod.client, "POST", "/api/chat/quiet/stream", body=body) as stream:
                await stream.rest()
            assert stream.events[-1].kind == "turn.completed"
        assert await calls(pod.stores, "evalsha", "eval") - before == 2, "begin and commit"


async def test_with_every_check_on_a_turn_is_two_round_trips(
    settings: Settings, stores: Stores, put_agent: PutAgent
) -> None:
    """Origin, session token, user token, and limits of every kind; what is told of them goes in the background."""
    key = "the site key of the shop, not of others"
    limits = {name: RateLimit(1_000, 60) for name in ("rate_limit", "agent_rate_limit", "domain_rate_limit")}
    await put_agent(
        "strict",
        allowed_domains=("shop.example",),
        site_keys=(key,),
        require_token=True,
        require_identity=True,
        truncate_ip=True,
        max_running_turns=5,
        turns_per_day=1_000,
        **limits,
    )
    token = jwt.encode({"sub": "ann", "exp": int(time()) + 600}, key)
    headers = {"Origin": "https://shop.example", "X-User-Token": token}
    async with gated_pod(settings, address_rate_limit="1000/60", address_session_limit="1000/60") as pod:
        opened = await pod.client.post("/api/sessions", json={"agent_id": "strict"}, headers=headers)
        headers["Authorization"] = f"Bearer {opened.json()['session_token']}"
        body = {"message": "Hello", "session_id": opened.json()["session_id"]}
        path = "/api/chat/strict/message"
        assert (await pod.client.post(path, json=body, headers=headers)).status_code == 200
        asked: list[str] = []
        run = pod.stores.scripts._run

        async def counted_run(name: str, *arguments: Any, **named: Any) -> Any:
            asked.append(name)
            return await run(name, *arguments, **named)

        pod.stores.scripts._run = counted_run  # type: ignore[method-assign]
        answer = await pod.client.post(path, json=body, headers=headers)
        assert (answer.status_code, answer.json()["metadata"]["message_count"]) == (200, 4)
        # An agent is looked up again every two seconds, and limits are told five times a second.
        assert [name for name in asked if name not in ("limit", "command")] == ["begin", "commit"]


async def test_control_without_coalescing_every_token_is_a_write(pod: SpokenPod) -> None:
    pod.tune(coalesce_s=0.0)
    spoken = pod.spoken
    session_id = new_session_id()
    before = await calls(pod.stores, "xadd")
    async with speak(pod.client, session_id, "Tell me") as stream:
        await stream.take(1)
        for n in range(100):
            spoken.say("Tell me", f"{n} ")
            await stream.take(1)
            turn_id = stream.events[0].data["turn_id"]
            key = pod.stores.keys.events(session_id, turn_id)
            expected = b"-%d" % (n + 2)

            async def written(key: str = key, expected: bytes = expected) -> bool:
                newest = await pod.stores.client.execute_command("XREVRANGE", key, "+", "-", "COUNT", 1)
                return bool(newest) and newest[0][0].endswith(expected)

            await wait_for(written, "the token is in Redis")
        spoken.end("Tell me")
        await stream.rest()
    assert await calls(pod.stores, "xadd") - before > 90


def resident_kb(pid: int) -> int:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1])
    raise AssertionError("no VmRSS")


async def test_500_idle_streams_on_a_pod_are_one_connection_and_little_memory(
    settings: Settings, stores: Stores, put_agent: PutAgent, tmp_path: Path, record_property: Any
) -> None:
    await put_agent("quiet")
    environment = {
        "GATEWAY_REDIS_URL": settings.redis_url,
        "GATEWAY_DATABASE_URL": settings.database_url,
        "GATEWAY_ADDRESS_RATE_LIMIT": "off",
        "GATEWAY_ADDRESS_SESSION_LIMIT": "off",
        "GATEWAY_MAX_STREAMS_PER_ADDRESS": "1000",
    }
    listening = await pubsub_connections(stores)
    pod = await GatewayProcess("serve", tmp_path, environment).start()
    try:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=pod.url, timeout=60, limits=limits) as client, AsyncExitStack() as stack:
            sessions = [new_session_id() for _ in range(IDLE // 5)]

            async def hello(session_id: str) -> None:
                body = {"message": "Hello", "session_id": session_id}
                assert (await client.post("/api/chat/quiet/message", json=body)).status_code == 200

            await asyncio.gather(*map(hello, sessions))

            async def idle(count: int) -> None:
                for n in range(count):
                    await stack.enter_async_context(watch(client, sessions[n % len(sessions)]))

            # The first hundred make the connections and buffers that are there once.
            await idle(100)
            await subscribed(stores, len(sessions))
            before = resident_kb(pod.process.pid)
            await idle(IDLE)
            await asyncio.gather(*map(hello, sessions[:1]))
            after = resident_kb(pod.process.pid)
            per_stream = (after - before) / IDLE
            record_property("kb_per_stream", round(per_stream, 1))
            print(f"memory per idle stream: {per_stream:.1f} KB")
            assert len(await pubsub_connections(stores)) - len(listening) == 1
            assert per_stream < 50, f"{per_stream:.1f} KB per stream"
    finally:
        pod.kill()


async def pubsub_connections(stores: Stores) -> list[bytes]:
    found: bytes = await stores.client.execute_command("CLIENT", "LIST", "TYPE", "PUBSUB")
    return found.splitlines()


async def subscribed(stores: Stores, sessions: int) -> None:
    """Waits until that many sessions are listened to."""

    async def enough() -> bool:
        pattern = f"{stores.keys.prefix}:*news:*"
        return len(await stores.client.execute_command("PUBSUB", "CHANNELS", pattern)) >= sessions

    await wait_for(enough, "the streams listen")
