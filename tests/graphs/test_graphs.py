"""The operator's graphs: how they are loaded, what a turn gives them and takes from them, and how bad ones end."""

import copy
import json
import operator
import sys
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import httpx
import msgspec
import pytest
from langchain_core.messages import AIMessage, BaseMessage, HumanMessage, SystemMessage
from langgraph.graph import StateGraph
from langgraph.graph.message import add_messages

from gateway.app import Pod, Stores, build_pod
from gateway.graphs.contract import Emit, GraphInput, GraphOutput
from gateway.graphs.graphs import Graphs
from gateway.graphs.loading import GraphError, load_graphs
from gateway.graphs.messages import message_maker
from gateway.problems import AgentInactive, AgentNotFound, GraphInvalidOutput, InvalidField, Problem
from gateway.settings import Settings
from persistence.model.agents import Agent, AgentDefinition
from persistence.model.session import Message
from tests.conftest import PutAgent
from tests.support.pods import environment_of, fields_of, gateway_process, plain_logs
from tests.support.serving import ROOT, GatewayProcess

PROJECT = ROOT / "tests" / "data" / "project" / "langgraph.json"
SESSION_ID = "session_1234567890_abc123xyz"
Rows = Callable[..., Awaitable[list[Any]]]
Flush = Callable[[], Awaitable[None]]


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with plain_logs():
        yield


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """With the graphs of the test project."""
    return msgspec.structs.replace(settings, graphs=str(PROJECT))


@pytest.fixture(scope="module")
async def graphs() -> Graphs:
    """The graphs of the test project, loaded once as a pod does."""
    return await load_graphs(PROJECT)


@pytest.fixture
async def pod(settings: Settings, stores: Stores, graphs: Graphs) -> Pod:
    """A pod with these graphs that is not served."""
    return Pod(settings, stores, graphs)


def agent_on(graph: str, **config: Any) -> Agent:
    return Agent("01980000-0000-7000-8000-000000000000", "shop", AgentDefinition(graph=graph, config=config))


def given(message: str = "Hello", **fields: Any) -> GraphInput:
    """What a graph is given in a session's first turn."""
    return msgspec.structs.replace(
        GraphInput(
            history=[],
            user_input=message,
            message_uuid="01980000-0000-7000-8000-000000000001",
            context={},
            metadata={},
            session_id=SESSION_ID,
            channel="text",
        ),
        **fields,
    )


async def say(client: httpx.AsyncClient, message: str, **fields: Any) -> httpx.Response:
    body = {"message": message, "session_id": SESSION_ID, **fields}
    return await client.post("/api/chat/shop/message", json=body)


async def messages_of(client: httpx.AsyncClient) -> list[dict[str, Any]]:
    """The session's transcript."""
    answer = await client.get(f"/api/sessions/{SESSION_ID}/messages")
    assert answer.status_code == 200, answer.text
    found: list[dict[str, Any]] = answer.json()["messages"]
    return found


# -------------------------------------------------------------------------------------------------------------- loading


async def test_every_entry_of_the_file_is_loaded_beside_the_built_in_graphs(graphs: Graphs) -> None:
    assert set(graphs.names) == set(json.loads(PROJECT.read_text())["graphs"]) | {"echo", "chat"}


async def test_without_a_file_there_are_the_built_in_graphs() -> None:
    assert "echo" in (await load_graphs(None)).names


@pytest.mark.parametrize(
    ("graph", "response"),
    [
        ("support", "answer 1: Hello"),
        ("described", "answer 1: Hello"),
        ("helper", "You asked: Hello"),
        ("builder", "Made: Hello"),
        ("made", "Made: Hello"),
        ("made_with_config", "Made: Hello"),
        ("made_later", "Made: Hello"),
        ("remembering", "1 messages"),
        ("remembering_below", "1 messages"),
        ("returns", "About returns: Hello"),
        ("typed", "Visit 1: Hello"),
        ("configured", "plain: Hello"),
    ],
)
async def test_each_way_to_write_a_graph_answers(graphs: Graphs, graph: str, response: str) -> None:
    assert (await graphs.run(agent_on(graph), given())).response == response


async def test_a_context_schema_gets_the_agents_config(graphs: Graphs) -> None:
    assert (await graphs.run(agent_on("configured", tone="friendly"), given())).response == "friendly: Hello"


async def test_a_graph_is_made_once_and_not_for_every_turn(graphs: Graphs) -> None:
    for _ in range(3):
        assert (await graphs.run(agent_on("made"), given())).metadata == {"made": 1}
    assert sys.modules["gateway_graph_made"].made == ["make"]


async def test_a_function_that_wants_a_config_gets_one(graphs: Graphs) -> None:
    assert sys.modules["gateway_graph_made_with_config"].made == ["make_with_config ['configurable']"]


@pytest.mark.parametrize("graph", ["remembering", "remembering_below"])
async def test_a_graph_with_a_checkpointer_keeps_nothing_and_doubles_nothing(
    client: httpx.AsyncClient, put_agent: PutAgent, graph: str
) -> None:
    await put_agent(graph=graph)
    answers = [(await say(client, f"Message {number}")).json()["response"] for number in range(3)]
    assert answers == ["1 messages", "3 messages", "5 messages"]
    module = sys.modules[f"gateway_graph_{graph}"]
    assert not module.saver.storage
    assert not module.saver_below.storage


async def test_files_are_found_from_the_file_and_not_from_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: Settings, stores: Stores
) -> None:
    (tmp_path / "elsewhere").mkdir()
    project = a_project(tmp_path, {"one": "./graphs/one.py:graph"}, {"graphs/one.py": FINE})

    monkeypatch.chdir(tmp_path / "elsewhere")
    assert "one" in (await load_graphs(project)).names

    monkeypatch.chdir(tmp_path)
    assert "one" in (await load_graphs(Path("langgraph.json"))).names
    pod = await build_pod(msgspec.structs.replace(settings, graphs="langgraph.json"), stores)
    assert pod.settings.graphs == "langgraph.json"


async def test_a_folder_named_as_dependency_can_be_imported_from(tmp_path: Path) -> None:
    project = a_project(
        tmp_path,
        {"one": "one_of_a_dependency:graph"},
        {"libraries/one_of_a_dependency.py": FINE},
        dependencies=["./libraries", "some-distribution"],
    )
    assert "one" in (await load_graphs(project)).names


async def test_two_graphs_of_files_with_one_name_are_two_graphs(tmp_path: Path) -> None:
    files = {"shop/graph.py": FINE.replace("Fine", "Shop"), "help/graph.py": FINE.replace("Fine", "Help")}
    graphs = await load_graphs(a_project(tmp_path, {"a": "./shop/graph.py:graph", "b": "./help/graph.py:graph"}, files))
    answers = [(await graphs.run(agent_on(name), given())).response for name in ("a", "b")]
    assert answers == ["Shop", "Help"]


FINE = """
from langgraph.graph import StateGraph

def _answer(state: dict) -> dict:
    return {"agent_response": "Fine"}

builder = StateGraph(dict)
builder.add_node("answer", lambda state: {**state, "agent_response": "Fine"})
builder.set_entry_point("answer")
graph = builder.compile()
number = 1

def fails():
    raise LookupError("no model is configured")

async def fails_later():
    raise LookupError("no model is configured")

def makes_none():
    return None

unfinished = StateGraph(dict)
"""


def a_project(folder: Path, graphs: dict[str, Any], files: dict[str, str], **fields: Any) -> Path:
    """Writes a project; its langgraph.json."""
    for name, text in files.items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    file = folder / "langgraph.json"
    file.write_text(json.dumps({"graphs": graphs, **fields}))
    return file


async def error_of(file: Path) -> str:
    """What the start of a pod says of a project that cannot be loaded."""
    try:
        with pytest.raises(GraphError) as raised:
            await load_graphs(file)
    except SystemExit as exit:
        # Left alone, it would end this process too.
        raise AssertionError(f"a graph ended the process with status {exit.code!r}") from exit
    return str(raised.value)


@pytest.mark.parametrize(
    ("reference", "says"),
    [
        ("./missing.py:graph", "FileNotFoundError"),
        ("./fine.py:nothing", "nothing"),
        ("./fine.py:number", "is int, not a graph"),
        ("./fine.py:makes_none", "is NoneType, not a graph"),
        ("./fine.py:fails", "no model is configured"),
        ("./fine.py:fails_later", "no model is configured"),
        ("./fine.py:unfinished", "ValueError"),
        ("./raises.py:graph", "no such setting"),
        ("./imports.py:graph", "no_such_package"),
        ("./syntax.py:graph", "SyntaxError"),
        ("./exits.py:graph", "SystemExit"),
        ("no_such_package.module:graph", "no_such_package"),
        ("./fine.py", "is not <file.py or module>:<variable>"),
        ("", "is not <file.py or module>:<variable>"),
        ({"description": "no path"}, "is not <file.py or module>:<variable>"),
    ],
)
async def test_what_cannot_be_loaded_is_told_with_the_name_of_the_graph(
    tmp_path: Path, reference: str | dict[str, str], says: str
) -> None:
    files = {
        "fine.py": FINE,
        "raises.py": "raise KeyError('no such setting')",
        "imports.py": "import no_such_package",
        "syntax.py": "def graph(:",
        "exits.py": "import sys; sys.exit(0)",
    }
    error = await error_of(a_project(tmp_path, {"fine": "./fine.py:graph", "culprit": reference}, files))
    assert "graph culprit" in error
    assert says in error


@pytest.mark.parametrize(
    "text",
    ["{", "[]", "{}", '{"graphs": []}', '{"graphs": ["one"]}', '{"graphs": 1}', '{"graphs": {}, "dependencies": 5}', "\xff"],
)
async def test_a_file_that_is_no_langgraph_json_is_told_by_its_path(tmp_path: Path, text: str) -> None:
    file = tmp_path / "langgraph.json"
    file.write_text(text, encoding="latin-1")
    if text == '{"graphs": []}':
        # Nothing is listed, so nothing is wrong.
        assert "echo" in (await load_graphs(file)).names
    else:
        assert str(file) in await error_of(file)


async def test_a_file_that_is_not_there_is_told_by_its_path(tmp_path: Path) -> None:
    assert str(tmp_path / "langgraph.json") in await error_of(tmp_path / "langgraph.json")


async def test_a_pod_with_a_broken_graph_does_not_start_and_says_which(
    settings: Settings, tmp_path: Path, empty: None
) -> None:
    project = a_project(tmp_path, {"culprit": "./exits.py:graph"}, {"exits.py": "import sys; sys.exit(0)"})
    process = GatewayProcess("serve", tmp_path, environment_of(settings) | {"GATEWAY_GRAPHS": str(project)}).spawn()
    try:
        status = process.process.wait(30)
    finally:
        process.kill()
    assert "graph culprit" in process.output()
    assert status == 1


# ---------------------------------------------------------------------------------------- what goes in and what comes out


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


KINDS = [HumanMessage, AIMessage, SystemMessage]


def containers_of(message: BaseMessage) -> list[Any]:
    """What of a message can be changed in place."""
    parts = [*vars(message).values(), vars(message), message.model_fields_set, message.__pydantic_extra__]
    return [part for part in parts if part is not None and not isinstance(part, (str, int, float, bool))]


@pytest.mark.parametrize("kind", KINDS)
def test_messages_of_the_history_are_what_langchains_constructors_make(kind: type[BaseMessage]) -> None:
    made, constructed = message_maker(kind)("Hello", "id 1"), kind(content="Hello", id="id 1")
    assert type(made) is kind
    assert made == constructed
    assert repr(made) == repr(constructed)
    assert vars(made) == vars(constructed)
    assert made.model_dump_json(exclude_unset=True) == constructed.model_dump_json(exclude_unset=True)


@pytest.mark.parametrize("kind", KINDS)
def test_two_messages_share_nothing_that_a_graph_can_change(kind: type[BaseMessage]) -> None:
    make = message_maker(kind)
    one, other = make("Hello", "id 1"), make("Hello", "id 2")
    assert containers_of(one)
    assert not {id(part) for part in containers_of(one)} & {id(part) for part in containers_of(other)}
    # Without containers of their own they would: pydantic's copy has those of its original.
    assert {id(part) for part in containers_of(one)} & {id(part) for part in containers_of(copy.copy(one))}


async def run_node(node: Any, state: Any, emit: Emit | None = None, **schemas: Any) -> GraphOutput:
    """Runs a graph of one node on this kind of state: "Where is it?", after a turn."""
    builder = StateGraph(state, **schemas)
    builder.add_node("node", node)
    builder.set_entry_point("node")
    graphs = Graphs({"helper": builder.compile()})
    past = [Message("id 1", "user", "Hello", ""), Message("id 2", "assistant", "Hi", "")]
    graph_input = GraphInput(past, "Where is it?", "id 3", {}, {}, "session_of_a_test", "text")
    return await graphs.run(Agent("id", "helper", AgentDefinition(graph="helper")), graph_input, emit)


@pytest.mark.parametrize("reducer", [add_messages, operator.add], ids=["LangGraph's", "its own"])
async def test_a_graph_is_given_the_same_messages_whatever_puts_them_together(reducer: Callable[..., Any]) -> None:
    given: list[Any] = []

    def answer(state: Any) -> dict[str, Any]:
        given.extend(state["messages"])
        return {"messages": [AIMessage("It is on its way.", id="answer")]}

    class State(TypedDict):
        messages: Annotated[list[Any], reducer]

    output = await run_node(answer, State)
    assert given == [HumanMessage("Hello", id="id 1"), AIMessage("Hi", id="id 2"), HumanMessage("Where is it?", id="id 3")]
    assert output.response == "It is on its way."


def said(state: dict[str, Any], *messages: BaseMessage) -> list[BaseMessage]:
    return [*state["messages"], *messages]


ANSWER = AIMessage("It is on its way.", id="answer")
ENDINGS: dict[str, Callable[[Any], Any]] = {
    "all of them, and an answer": lambda state: {"messages": said(state, ANSWER)},
    "the answer alone": lambda state: {"messages": [ANSWER]},
    "the answer first": lambda state: {"messages": [ANSWER, *said(state)]},
    "all of them twice, and an answer": lambda state: {"messages": [*said(state), *said(state, ANSWER)]},
    "an answer put into the list it was given": lambda state: state["messages"].append(ANSWER),
}
WITHOUT_ANSWER: dict[str, Callable[[Any], Any]] = {
    "nothing": lambda state: None,
    "all of them twice": lambda state: {"messages": [*said(state), *said(state)]},
    "others of the same ids": lambda state: {"messages": [message.model_copy() for message in state["messages"]]},
    "the older ones again": lambda state: {"messages": said(state, *state["messages"][:2])},
}


class PlainState(TypedDict):
    """Messages without a reducer: a graph leaves what its node returns."""

    messages: list[Any]


@pytest.mark.parametrize("ending", ENDINGS)
async def test_the_answer_is_found_wherever_a_graph_leaves_it(ending: str) -> None:
    assert (await run_node(ENDINGS[ending], PlainState)).response == "It is on its way."


@pytest.mark.parametrize("ending", WITHOUT_ANSWER)
async def test_what_a_graph_was_given_is_not_its_answer(ending: str) -> None:
    with pytest.raises(GraphInvalidOutput, match="added no AI message"):
        await run_node(WITHOUT_ANSWER[ending], PlainState)


@pytest.mark.parametrize("emit", [None, lambda event: None], ids=["at once", "streamed"])
async def test_what_a_graph_keeps_to_itself_is_not_taken_from_it(emit: Emit | None) -> None:
    class Output(TypedDict):
        agent_response: str

    class State(Output):
        metadata: dict[str, Any]

    def answer(state: Any) -> dict[str, Any]:
        return {"agent_response": "It is on its way.", "metadata": {"note": "its own"}}

    output = await run_node(answer, State, emit, output_schema=Output)
    assert (output.response, output.metadata) == ("It is on its way.", {})


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


# --------------------------------------------------------------------------------------------------------- the Python API


async def test_execute_text_answers_with_a_response_and_metadata(pod: Pod, put_agent: PutAgent) -> None:
    agent = await put_agent(graph="support")
    first = await pod.runtime.execute_text(agent.id, "One", SESSION_ID)
    assert set(first) == {"response", "metadata"}
    assert first["response"] == "answer 1: One"
    second = await pod.runtime.execute_text("shop", "Two", SESSION_ID, {"page": "/"})
    assert second["response"] == "answer 2: Two"
    assert second["metadata"]["given"] == {"page": "/"}
    assert second["metadata"]["message_count"] == 4


async def test_execute_text_and_the_http_api_share_a_session(
    pod: Pod, client: httpx.AsyncClient, put_agent: PutAgent
) -> None:
    await put_agent(graph="support")
    await say(client, "One", metadata={"website_domain": "Shop.Example."})
    answer = await pod.runtime.execute_text("shop", "Two", SESSION_ID, {"website_domain": "Shop.Example."})
    assert answer["response"] == "answer 2: Two"


async def test_execute_text_knows_no_agent_that_is_not_there(pod: Pod) -> None:
    with pytest.raises(AgentNotFound):
        await pod.runtime.execute_text("nobody", "One", SESSION_ID)


async def test_execute_text_refuses_an_agent_that_is_switched_off(pod: Pod, put_agent: PutAgent) -> None:
    await put_agent(active=False)
    with pytest.raises(AgentInactive):
        await pod.runtime.execute_text("shop", "One", SESSION_ID)


@pytest.mark.parametrize("session_id", ["", "short", "a session with spaces", "s" * 256, "session_of_a_line\nbreak"])
async def test_execute_text_refuses_what_is_no_session_id(
    pod: Pod, stores: Stores, put_agent: PutAgent, session_id: str
) -> None:
    await put_agent()
    with pytest.raises(InvalidField):
        await pod.runtime.execute_text("shop", "One", session_id)
    assert await stores.client.exists(stores.keys.session(session_id)) == 0


@pytest.mark.parametrize("odd", ["a\0b", "a\ud800b"], ids=["NUL", "lone surrogate"])
@pytest.mark.parametrize("where", ["message", "metadata"])
async def test_execute_text_lets_no_text_in_that_postgres_cannot_hold(
    pod: Pod, stores: Stores, put_agent: PutAgent, flush: Flush, odd: str, where: str
) -> None:
    await put_agent()
    message, metadata = (odd, {}) if where == "message" else ("One", {"page": odd})
    with pytest.raises(InvalidField):
        await pod.runtime.execute_text("shop", message, SESSION_ID, metadata)
    await flush()
    assert await stores.outbox.dead_letters() == []


# ------------------------------------------------------------------------------------------------------------- bad graphs

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


# ------------------------------------------------------------------------------------------------------ a real gateway pod


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
