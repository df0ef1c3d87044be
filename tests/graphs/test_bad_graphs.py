"""Graphs that raise, hang, exit or answer nonsense end their turn and nothing else."""

from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.app import Pod, Stores
from gateway.problems import Problem
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.graphs.conftest import PROJECT, SESSION_ID, Flush, Rows, say
from tests.support.pods import fields_of, gateway_process

AT_ONCE = {"turn_timeout_s": 30}
SOON = {"turn_timeout_s": 0.3, "config": {"for_s": 2}}
FAILURES = [
    ("raises", 502, "graph_failed", AT_ONCE),
    ("raises_base", 502, "graph_failed", AT_ONCE),
    ("cancels_itself", 502, "graph_failed", AT_ONCE),
    ("hangs", 504, "turn_timeout", SOON),
    ("swallows_cancellation", 504, "turn_timeout", SOON),
    ("turns_cancellation_into_error", 504, "turn_timeout", SOON),
    ("blocks", 504, "turn_timeout", SOON),
    ("answers_with_dict", 502, "graph_invalid_output", AT_ONCE),
    ("context_is_list", 502, "graph_invalid_output", AT_ONCE),
    ("metadata_is_no_json", 502, "graph_invalid_output", AT_ONCE),
    ("metadata_is_too_deep", 502, "graph_invalid_output", AT_ONCE),
    ("says_nothing", 502, "graph_invalid_output", AT_ONCE),
    ("state_is_no_dict", 502, "graph_invalid_output", AT_ONCE),
]


@pytest.mark.parametrize(("graph", "status", "code", "limits"), FAILURES, ids=[failure[0] for failure in FAILURES])
async def test_a_bad_graph_ends_its_turn_and_leaves_the_session_as_it_was(
    client: httpx.AsyncClient,
    put_agent: PutAgent,
    stores: Stores,
    flush: Flush,
    rows: Rows,
    graph: str,
    status: int,
    code: str,
    limits: dict[str, Any],
) -> None:
    await put_agent(graph="echo")
    await say(client, "One")
    await flush()
    key = stores.keys.session(SESSION_ID)
    before = await fields_of(stores, SESSION_ID)
    ttl_s = await stores.client.ttl(key)

    await put_agent(graph=graph, **limits)
    failed = await say(client, "Two", message_id="m2", metadata={"page": "/"})

    assert (failed.status_code, failed.json()["code"]) == (status, code)
    assert failed.headers["content-type"] == "application/problem+json"
    assert await fields_of(stores, SESSION_ID) == before
    assert ttl_s - 10 <= await stores.client.ttl(key) <= ttl_s
    assert (await stores.outbox.backlog(0)).records == 0

    await put_agent(graph="echo")
    # `reject`: the session is free at once, not when a lease has run out.
    after = await say(client, "Two", message_id="m2", if_busy="reject")
    assert after.status_code == 200, after.text
    assert after.json()["metadata"]["history"] == 2
    await flush()
    stored = await rows("SELECT content FROM agent_messages ORDER BY seq")
    assert [row[0] for row in stored] == ["One", "You said: One", "Two", "You said: Two"]


async def test_a_graph_that_is_not_configured_here_ends_its_turn_with_a_clear_error(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores
) -> None:
    await put_agent(graph="echo")
    await say(client, "One")
    before = await fields_of(stores, SESSION_ID)
    await put_agent(graph="elsewhere")
    failed = await say(client, "Two")
    assert (failed.status_code, failed.json()["code"]) == (503, "graph_not_configured")
    assert await fields_of(stores, SESSION_ID) == before


async def test_a_visitor_whose_first_turn_fails_can_try_again(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent(graph="raises")
    assert (await say(client, "One")).status_code == 502
    await put_agent(graph="echo")
    again = await say(client, "One", if_busy="reject")
    assert again.json()["metadata"]["history"] == 0
    assert again.json()["metadata"]["message_count"] == 2


async def test_what_a_graph_raises_is_not_told_to_the_visitor(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent(graph="raises")
    assert "model is gone" not in (await say(client, "One")).text


async def test_a_bad_graph_is_a_problem_in_python_too(pod: Pod, put_agent: PutAgent) -> None:
    await put_agent(graph="raises")
    with pytest.raises(Problem) as raised:
        await pod.runtime.execute_text("shop", "One", SESSION_ID)
    assert (raised.value.status, raised.value.code) == (502, "graph_failed")


async def test_graphs_that_block_a_thread_do_not_stop_other_sessions(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent(graph="blocks", turn_timeout_s=0.3)
    await put_agent("other", graph="echo")
    assert (await say(client, "One")).status_code == 504
    body = {"message": "Hello", "session_id": f"{SESSION_ID}_other"}
    assert (await client.post("/api/chat/other/message", json=body)).status_code == 200


@pytest.mark.parametrize("graph", ["exits", "exits_in_thread"])
async def test_a_graph_that_exits_ends_its_turn_and_not_the_pod(
    settings: Settings, stores: Stores, put_agent: PutAgent, tmp_path: Path, graph: str
) -> None:
    await put_agent("shop", graph=graph)
    async with (
        gateway_process("serve", settings, tmp_path, GATEWAY_GRAPHS=str(PROJECT)) as process,
        httpx.AsyncClient(base_url=process.url, timeout=30) as client,
    ):
        try:
            failed = await say(client, "One")
        except httpx.TransportError as error:
            raise AssertionError(f"the pod ended with status {process.process.wait(10)}") from error
        assert (failed.status_code, failed.json()["code"]) == (502, "graph_failed")
        assert (await client.get("/healthz")).status_code == 200


async def test_what_a_visitor_wrote_is_not_in_the_log_when_a_graph_fails(
    settings: Settings, stores: Stores, put_agent: PutAgent, tmp_path: Path
) -> None:
    await put_agent("shop", graph="raises")
    async with (
        gateway_process("serve", settings, tmp_path, GATEWAY_GRAPHS=str(PROJECT)) as process,
        httpx.AsyncClient(base_url=process.url, timeout=30) as client,
    ):
        assert (await say(client, "my PIN is 4711")).status_code == 502
        assert process.stop() == 0
        assert "graph.failed" in process.output()
        assert "4711" not in process.output()
        assert SESSION_ID not in process.output()


async def test_a_graph_that_swallows_its_cancellation_does_not_keep_a_pod_from_ending(
    settings: Settings, stores: Stores, put_agent: PutAgent, tmp_path: Path
) -> None:
    await put_agent("shop", graph="swallows_cancellation", turn_timeout_s=0.3)
    environment = {"GATEWAY_GRAPHS": str(PROJECT), "GATEWAY_DRAIN_S": "1"}
    async with (
        gateway_process("serve", settings, tmp_path, **environment) as process,
        httpx.AsyncClient(base_url=process.url, timeout=30) as client,
    ):
        assert (await say(client, "One")).status_code == 504
        # The graph goes on for half a minute; nobody waits for its answer any more.
        assert process.stop(8) == 0
