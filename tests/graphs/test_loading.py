"""How the operator's graphs are loaded, and what a pod says of those that cannot be."""

import json
import sys
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest

from gateway.app import Stores, build_pod
from gateway.graphs.graphs import Graphs
from gateway.graphs.loading import GraphError, load_graphs
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.graphs.conftest import PROJECT, agent_on, given, say
from tests.support.pods import environment_of
from tests.support.serving import GatewayProcess


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
