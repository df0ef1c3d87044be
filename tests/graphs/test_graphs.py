"""What a turn gives the operator's graphs and takes from them."""

import json
from pathlib import Path

import httpx
import pytest

from gateway.app import Stores
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.graphs.conftest import PROJECT, SESSION_ID, Flush, Rows, messages_of, say
from tests.support.pods import fields_of, gateway_process


async def test_the_support_graph_sees_the_whole_state_and_its_context_comes_back(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush, rows: Rows
) -> None:
    await put_agent(graph="support")
    first = await say(client, "Where is my parcel?", metadata={"page": "/orders"}, channel="voice")
    assert first.status_code == 200
    assert first.json()["response"] == "answer 1: Where is my parcel?"
    assert first.json()["metadata"]["seen"] == ["human: Where is my parcel?"]
    assert first.json()["metadata"]["given"] == {"page": "/orders"}
    assert first.json()["metadata"]["session"] == SESSION_ID
    assert first.json()["metadata"]["channel"] == "voice"

    second = await say(client, "I want a refund")
    assert second.json()["response"] == "refund 2: I want a refund"
    assert second.json()["metadata"]["seen"] == [
        "human: Where is my parcel?",
        "ai: answer 1: Where is my parcel?",
        "human: I want a refund",
    ]
    assert (await client.get(f"/api/sessions/{SESSION_ID}")).json()["context"] == {"turns": 2}
    assert json.loads((await fields_of(stores, SESSION_ID))["context"]) == {"turns": 2}

    await flush()
    assert [json.loads(row[0]) for row in await rows("SELECT context_data FROM agent_sessions")] == [{"turns": 2}]


async def test_context_and_history_come_back_from_postgres_when_redis_has_evicted_the_session(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush
) -> None:
    await put_agent(graph="support")
    await say(client, "One")
    await flush()
    await stores.client.delete(stores.keys.session(SESSION_ID))
    answer = await say(client, "Two")
    assert answer.json()["response"] == "answer 2: Two"
    assert answer.json()["metadata"]["seen"] == ["human: One", "ai: answer 1: One", "human: Two"]


@pytest.mark.parametrize("evicted", [False, True], ids=["from Redis", "from Postgres"])
@pytest.mark.parametrize(
    ("window", "seen"),
    [
        (0, ["human: Four"]),
        (1, ["ai: answer 3: Three", "human: Four"]),
        (3, ["ai: answer 2: Two", "human: Three", "ai: answer 3: Three", "human: Four"]),
        (4, ["human: Two", "ai: answer 2: Two", "human: Three", "ai: answer 3: Three", "human: Four"]),
    ],
)
async def test_a_graph_is_given_as_many_messages_as_the_history_window_allows(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush, window: int, seen: list[str], evicted: bool
) -> None:
    await put_agent(graph="support", history_window=window)
    for message in ("One", "Two", "Three"):
        assert (await say(client, message)).status_code == 200
    if evicted:
        await flush()
        await stores.client.delete(stores.keys.session(SESSION_ID))
    assert (await say(client, "Four")).json()["metadata"]["seen"] == seen
    assert len(await messages_of(client)) == 8


async def test_a_graph_on_plain_messages_state_answers_from_the_history(
    client: httpx.AsyncClient, put_agent: PutAgent
) -> None:
    await put_agent(graph="helper")
    await say(client, "One")
    answer = await say(client, "Two")
    assert answer.json()["response"] == "You asked: One | Two"


async def test_tokens_model_and_latency_are_recorded_with_each_answer(
    client: httpx.AsyncClient, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent(graph="helper")
    latencies = [(await say(client, message)).json()["metadata"]["latency_ms"] for message in ("One", "Two")]
    assert all(isinstance(latency, int) and latency >= 0 for latency in latencies)
    expected = [
        ("user", None, None, None),
        ("assistant", 2, latencies[0], "recalling-1"),
        ("user", None, None, None),
        ("assistant", 4, latencies[1], "recalling-1"),
    ]
    names = ("role", "tokens_used", "latency_ms", "model_used")
    assert [tuple(message.get(name) for name in names) for message in await messages_of(client)] == expected

    await flush()
    stored = await rows("SELECT role, tokens_used, latency_ms, model_used FROM agent_messages ORDER BY seq")
    assert [tuple(row) for row in stored] == expected


async def test_an_answer_without_a_model_has_a_latency_and_nothing_else(
    client: httpx.AsyncClient, put_agent: PutAgent
) -> None:
    await put_agent(graph="support")
    await say(client, "One")
    answer = (await messages_of(client))[1]
    assert "latency_ms" in answer
    assert "tokens_used" not in answer
    assert "model_used" not in answer


async def test_context_that_a_graph_changes_in_place_is_stored(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent(graph="changes_in_place")
    answers = [(await say(client, f"Message {number}")).json()["response"] for number in range(3)]
    assert answers == ["Turn 1", "Turn 2", "Turn 3"]


async def test_metadata_that_a_graph_changes_in_place_are_returned(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent(graph="changes_in_place")
    assert (await say(client, "One", metadata={"page": "/"})).json()["metadata"].get("turns") == 1


async def test_metadata_that_a_graph_changes_in_place_are_not_taken_for_the_visitors(
    client: httpx.AsyncClient, put_agent: PutAgent, flush: Flush, rows: Rows
) -> None:
    await put_agent(graph="changes_in_place")
    await say(client, "One", metadata={"page": "/"})
    await flush()
    stored = await rows("SELECT metadata FROM agent_messages WHERE role = 'user'")
    assert [json.loads(row[0]) for row in stored] == [{"page": "/"}]


async def test_a_graph_cannot_pass_off_its_metadata_as_the_gateways(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent(graph="overrides")
    metadata = (await say(client, "One")).json()["metadata"]
    assert metadata["session_id"] == SESSION_ID
    assert metadata["replayed"] is False
    assert metadata["own"] == 1


async def test_text_that_cannot_be_stored_is_replaced_wherever_a_graph_puts_it(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush, rows: Rows
) -> None:
    await put_agent(graph="odd_text")
    answer = await say(client, "One", message_id="m1")
    assert answer.status_code == 200, answer.text
    clean = answer.json()["response"]
    assert clean.replace("\ufffd", "") == "abc"
    assert clean.startswith("a\ufffdb\ufffd")
    assert answer.json()["metadata"][clean] == {"deep": clean}
    await flush()
    assert await stores.outbox.dead_letters() == []
    stored = await rows("SELECT content FROM agent_messages WHERE role = 'assistant'")
    assert [row[0] for row in stored] == [clean]
    assert [json.loads(row[0]) for row in await rows("SELECT context_data FROM agent_sessions")] == [{clean: [clean]}]
    replay = await say(client, "One", message_id="m1")
    assert replay.json()["metadata"] == answer.json()["metadata"] | {"replayed": True}


async def test_a_pod_serves_the_graphs_of_the_operators_project(
    settings: Settings, stores: Stores, put_agent: PutAgent, tmp_path: Path
) -> None:
    await put_agent("shop", graph="support")
    await put_agent("desk", graph="helper")
    async with (
        gateway_process("serve", settings, tmp_path, GATEWAY_GRAPHS=str(PROJECT)) as process,
        httpx.AsyncClient(base_url=process.url, timeout=30) as client,
    ):
        await say(client, "One")
        assert (await say(client, "Two")).json()["response"] == "answer 2: Two"
        desk = {"message": "Hello", "session_id": f"{SESSION_ID}_desk"}
        assert (await client.post("/api/chat/desk/message", json=desk)).json()["response"] == "You asked: Hello"
        assert process.stop() == 0
