"""The commands: they refuse to start on what would break the promises, and end in good order."""

import asyncio
import json
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from msgspec import structs

from gateway.access.tokens import fingerprint
from gateway.agents import document_of
from gateway.app import Stores
from gateway.cli import main
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from persistence.model.agents import AgentDefinition, RateLimit
from persistence.model.session import NewSession
from tests.conftest import PutAgent
from tests.support.commands import Done, run_gateway
from tests.support.serving import ADMIN_KEY, ROOT, SECRET_KEY, GatewayProcess, wait_for
from tests.support.visiting import Rows, new_session_id, post_message, problem

SESSIONS = 300


@pytest.fixture
def variables(settings: Settings) -> dict[str, str]:
    """The environment of a process on the test servers."""
    return {
        "GATEWAY_REDIS_URL": settings.redis_url,
        "GATEWAY_DATABASE_URL": settings.database_url,
        "GATEWAY_SECRET_KEY": SECRET_KEY,
        "GATEWAY_ADMIN_KEY": ADMIN_KEY,
        "GATEWAY_LOG_FORMAT": "json",
    }


async def both(variables: dict[str, str]) -> list[Done]:
    """How a pod and a worker end that may not start."""
    return await asyncio.gather(*(run_gateway(command, variables=variables) for command in ("serve", "worker")))


async def test_a_missing_wrong_or_misspelt_setting_stops_the_start_with_a_sentence(variables: dict[str, str]) -> None:
    without_key = {name: value for name, value in variables.items() if name != "GATEWAY_ADMIN_KEY"}
    cases = (
        ("serve", without_key, "gateway: GATEWAY_ADMIN_KEY is not set"),
        ("serve", variables | {"GATEWAY_PORT": "eighty"}, "gateway: GATEWAY_PORT: expected `int`, got `str`"),
        ("worker", variables | {"GATEWAY_REDIS_URI": "x"}, "gateway: GATEWAY_REDIS_URI is not a setting; did you mean "),
    )
    ended = await asyncio.gather(*(run_gateway(command, variables=given) for command, given, _ in cases))
    for done, (_, _, said) in zip(ended, cases, strict=True):
        assert done.status == 1, done
        assert done.error.startswith(said)
        assert done.error.count("\n") == 1, "one sentence, no traceback"
        assert done.out == ""


async def test_a_redis_that_could_evict_unflushed_answers_is_refused(tmp_path: Path, variables: dict[str, str]) -> None:
    with RedisServer(tmp_path, free_port(), config={"maxmemory-policy": "allkeys-lru"}) as redis:
        elsewhere = variables | {"GATEWAY_REDIS_URL": redis.url}
        for done in await both(elsewhere):
            assert done.status != 0
            (said,) = (line for line in done.error.splitlines() if line.startswith("gateway: "))
            assert "maxmemory-policy is allkeys-lru" in said
            assert "volatile-lru" in said


async def test_another_number_of_partitions_than_the_recorded_one_is_refused(
    stores: Stores, variables: dict[str, str]
) -> None:
    for done in await both(variables | {"GATEWAY_PARTITIONS": "16"}):
        assert done.status != 0
        assert "gateway: gw:meta says partitions = 1, this process is set to 16; set GATEWAY_PARTITIONS" in done.error
    assert await stores.client.hget(stores.keys.meta, "partitions") == b"1"


async def test_a_redis_that_is_not_there_stops_the_start(variables: dict[str, str]) -> None:
    done = await run_gateway("serve", variables=variables | {"GATEWAY_REDIS_URL": f"redis://127.0.0.1:{free_port()}"})
    assert done.status == 1
    assert done.error.splitlines()[-1].startswith("gateway: ")
    assert "Traceback" not in done.error


async def test_migrating_twice_applies_everything_once(postgres_server: PostgresServer) -> None:
    variables = {"GATEWAY_DATABASE_URL": postgres_server.create_database("migrated_by_command")}
    first = await run_gateway("migrate", variables=variables)
    again = await run_gateway("migrate", variables=variables)
    assert (first.status, first.out.splitlines()[0]) == (0, "applied 0001_tables")
    assert (again.status, again.out) == (0, "nothing to apply\n")


async def put(variables: dict[str, str], *arguments: str, **definition: Any) -> Done:
    """`gateway agents put shop`, with a definition on stdin if there is one."""
    given = ("--definition", "-") if definition else ()
    return await run_gateway(
        "agents", "put", "shop", *arguments, *given, variables=variables, stdin=json.dumps(definition) if definition else ""
    )


async def test_agents_are_put_shown_listed_and_deleted(stores: Stores, variables: dict[str, str]) -> None:
    made = await put(variables, "--graph", "echo")
    assert made.status == 0, made.error
    word, name, agent_id = made.out.split()
    assert (word, name) == ("created", "shop")

    site_key = "a site key that nobody is shown again"
    again = await put(variables, history_window=4, site_keys=[site_key])
    assert again.out.splitlines() == [
        f"changed shop {agent_id}",
        "  history_window: 50 -> 4",
        f'  site_keys: [] -> ["{fingerprint(site_key)}"]',
    ]

    shown_out, listed = await asyncio.gather(
        run_gateway("agents", "show", agent_id, variables=variables), run_gateway("agents", "list", variables=variables)
    )
    shown = json.loads(shown_out.out)
    assert (shown["id"], shown["name"], shown["history_window"]) == (agent_id, "shop", 4)
    assert shown["site_keys"] == [fingerprint(site_key)]
    assert site_key not in shown_out.out + again.out + again.error
    assert (await stores.agents.load("shop")).definition.history_window == 4

    assert [line.split() for line in listed.out.splitlines()] == [[agent_id, "shop", "echo", "active"]]
    back = await run_gateway(
        "agents", "put", "shop", "--replace", "--definition", "-", variables=variables, stdin=shown_out.out
    )
    assert back.out == f"nothing changed: shop {agent_id}\n", "what is shown can be put back"

    deleted = await run_gateway("agents", "delete", "shop", variables=variables)
    assert (deleted.status, deleted.out) == (0, "deleted shop\n")


PROTECTED: dict[str, Any] = {
    "config": {"delay_ms": 1, "auth": {"api_key": "sk-one"}},
    "allowed_domains": ("shop.example",),
    "site_keys": ("a site key of thirty-two letters",),
    "retention_days": 30,
    "rate_limit": RateLimit(30, 60),
}


async def test_putting_an_agent_changes_what_is_named_and_prints_it(
    stores: Stores, put_agent: PutAgent, variables: dict[str, str]
) -> None:
    agent = await put_agent("shop", **PROTECTED)
    graph = await put(variables, "--graph", "support")
    assert graph.out.splitlines() == [f"changed shop {agent.id}", '  graph: "echo" -> "support"']
    assert (await stores.agents.load_stored("shop")).definition == structs.replace(agent.definition, graph="support")

    merged = await put(
        variables,
        config={"auth": {"api_key": "sk-two", "region": "eu"}, "delay_ms": None},
        rate_limit={"messages": 5},
        allowed_domains=["b.example"],
        retention_days=None,
    )
    assert merged.out.splitlines()[1:] == [
        f'  config.auth.api_key: "{fingerprint("sk-one")}" -> "{fingerprint("sk-two")}"',
        '  config.auth.region: (none) -> "eu"',
        "  config.delay_ms: 1 -> (none)",
        '  allowed_domains: ["shop.example"] -> ["b.example"]',
        "  rate_limit.messages: 30 -> 5",
        "  retention_days: 30 -> null",
    ]
    assert (await put(variables, "--graph", "support")).out == f"nothing changed: shop {agent.id}\n"
    assert (await put(variables)).out == f"nothing changed: shop {agent.id}\n"


async def test_replacing_an_agent_gives_the_rest_its_defaults(
    stores: Stores, put_agent: PutAgent, variables: dict[str, str]
) -> None:
    """The control: this is what every put did once."""
    agent = await put_agent("shop", **PROTECTED)
    replaced = await put(variables, "--graph", "echo", "--replace")
    assert {line.split(":")[0].strip() for line in replaced.out.splitlines()[1:]} == {
        "config.delay_ms",
        "config.auth",
        "allowed_domains",
        "site_keys",
        "retention_days",
    }
    assert "sk-one" not in replaced.out
    assert (await stores.agents.load_stored(agent.id)).definition == AgentDefinition(graph="echo")


async def test_of_long_texts_the_place_where_they_differ_is_printed(put_agent: PutAgent, variables: dict[str, str]) -> None:
    prompt = "You answer the customers of a shop for bicycles. " * 20
    await put_agent("shop", config={"prompt": prompt + "Be brief."})
    line = (await put(variables, config={"prompt": prompt + "Be kind."})).out.splitlines()[1]
    assert line == '  config.prompt: …op for bicycles. Be brief." -> …op for bicycles. Be kind."'


async def test_a_graph_that_is_not_in_langgraph_json_is_refused(
    tmp_path: Path, put_agent: PutAgent, variables: dict[str, str]
) -> None:
    """Without importing any graph. An agent whose graph is gone can still be changed."""
    file = tmp_path / "langgraph.json"
    file.write_text(json.dumps({"graphs": {"support": "./nowhere.py:graph"}}))
    with_graphs = variables | {"GATEWAY_GRAPHS": str(file)}
    refused = await put(with_graphs, "--graph", "suport")
    assert (refused.status, refused.error.splitlines()[-1]) == (
        1,
        "gateway: graph: not one of this server's graphs: chat, echo, support",
    )
    assert (await put(with_graphs, "--graph", "support")).status == 0
    await put_agent("shop", graph="gone")
    assert (await put(with_graphs, active=False)).status == 0
    assert (await put(variables, "--graph", "anything")).status == 0, "what pods have is not known here"


async def test_what_is_wrong_with_an_agent_is_said_in_a_sentence_that_names_the_field(
    stores: Stores, put_agent: PutAgent, variables: dict[str, str]
) -> None:
    await put_agent("bank")
    cases: list[tuple[tuple[str, ...], str, str]] = [
        (("show", "nobody"), "", "There is no such agent"),
        (("put", "shop"), "", "graph: object missing required field `graph`"),
        (("put", "shop", "--definition", "-"), "{", "definition: Input data was truncated"),
        (("put", "shop", "--definition", "-"), '{"graph": "echo", "graf": 1}', "graf: object contains unknown field `graf`"),
        (("put", "bank", "--definition", "-"), '{"config": {"a": "\\u0000"}}', "config.a: NUL characters cannot be stored"),
    ]
    ended = await asyncio.gather(
        *(run_gateway("agents", *arguments, variables=variables, stdin=stdin) for arguments, stdin, _ in cases)
    )
    for done, (_, _, said) in zip(ended, cases, strict=True):
        assert (done.status, done.out) == (1, "")
        assert done.error.splitlines()[-1] == f"gateway: {said}"
        assert "Traceback" not in done.error


EDITOR = """#!/usr/bin/env python3
import json, pathlib, sys
script, file = pathlib.Path(sys.argv[0]), pathlib.Path(sys.argv[1])
steps = json.loads(script.with_suffix(".steps").read_text())
step = steps.pop(0)
script.with_suffix(".steps").write_text(json.dumps(steps))
with script.with_suffix(".seen").open("a") as seen:
    seen.write(json.dumps([oct(file.stat().st_mode & 0o777), file.read_text()]) + "\\n")
exec(step)
"""


class Editor:
    """A scripted editor: each time it is opened it runs the next of its steps, Python with the draft as `file`."""

    def __init__(self, folder: Path, variables: dict[str, str]) -> None:
        self._folder = folder
        self._script = folder / "editor.py"
        self._script.write_text(EDITOR)
        self._script.chmod(0o700)
        self._variables = variables | {"VISUAL": str(self._script), "EDITOR": "false", "TMPDIR": str(folder)}

    async def edit(self, *steps: str, stdin: str = "", **variables: str) -> Done:
        """`gateway agents edit shop`."""
        self._script.with_suffix(".steps").write_text(json.dumps(steps))
        return await run_gateway("agents", "edit", "shop", variables=self._variables | variables, stdin=stdin)

    def seen(self) -> list[tuple[str, str]]:
        """Mode and text of the draft each time the editor was opened."""
        return [tuple(json.loads(line)) for line in self._script.with_suffix(".seen").read_text().splitlines()]

    def drafts(self) -> list[Path]:
        """The drafts that are left."""
        return list(self._folder.glob("gateway-*.json"))


def replacing(old: str, new: str) -> str:
    """A step that replaces a text in the draft."""
    return f"text = file.read_text(); assert {old!r} in text; file.write_text(text.replace({old!r}, {new!r}))"


@pytest.fixture
def editor(tmp_path: Path, variables: dict[str, str]) -> Editor:
    return Editor(tmp_path, variables)


async def test_an_agent_is_edited_as_it_is_shown(
    editor: Editor, stores: Stores, put_agent: PutAgent, variables: dict[str, str]
) -> None:
    agent = await put_agent("shop", **PROTECTED)
    done = await editor.edit(replacing('"history_window": 50', '"history_window": 4'))
    assert (done.status, done.out.splitlines()) == (0, [f"changed shop {agent.id}", "  history_window: 50 -> 4"])
    ((mode, text),) = editor.seen()
    assert mode == "0o600"
    assert json.loads(text) == document_of(agent)
    assert (await stores.agents.load_stored("shop")).definition == structs.replace(agent.definition, history_window=4)
    assert (await editor.edit("pass")).out == f"nothing changed: shop {agent.id}\n"
    assert editor.drafts() == []


async def test_an_edit_with_a_mistake_is_explained_and_can_go_on_or_be_given_up(
    editor: Editor, stores: Stores, put_agent: PutAgent
) -> None:
    agent = await put_agent("shop")
    wrong = replacing('"history_window": 50', '"history_window": "4"')
    done = await editor.edit(wrong, replacing('"history_window": "4"', '"history_window": 4'), stdin="y\n")
    assert "gateway: history_window: expected `int`, got `str`" in done.error
    assert done.status == 0
    assert done.out.splitlines()[-1] == "  history_window: 50 -> 4"
    assert '"history_window": "4"' in editor.seen()[1][1], "with what was typed"
    for step, answer, said in (
        ("file.write_text('{')", "n\n", "definition: Input data was truncated"),
        (replacing('"name": "shop"', '"name": "bank"'), "", "name: the agent has another, which stays"),
    ):
        done = await editor.edit(step, stdin=answer)
        assert (done.status, done.error.splitlines()[-1]) == (1, "gateway: nothing is saved")
        assert said in done.error
    assert (await stores.agents.load_stored("shop")).definition == structs.replace(agent.definition, history_window=4)
    assert editor.drafts() == []


async def test_an_edit_never_overwrites_what_somebody_else_has_changed_meanwhile(
    editor: Editor, stores: Stores, put_agent: PutAgent, variables: dict[str, str]
) -> None:
    agent = await put_agent("shop")

    def meanwhile(*arguments: str) -> str:
        return f"import subprocess; subprocess.run({[sys.executable, '-m', 'gateway', 'agents', *arguments]}, check=True)"

    mine = replacing('"history_window": 50', '"history_window": 4')
    done = await editor.edit(f"{meanwhile('put', 'shop', '--graph', 'support')}; {mine}")
    assert done.status == 1
    (draft,) = editor.drafts()
    said = f"gateway: shop was changed meanwhile: nothing is saved; your edit is in {draft}"
    assert done.error.splitlines()[-1] == said
    assert json.loads(draft.read_text()) == document_of(agent) | {"history_window": 4}
    assert (await stores.agents.load_stored("shop")).definition == structs.replace(agent.definition, graph="support")
    done = await editor.edit(f"{meanwhile('delete', 'shop')}; {mine}")
    assert "gateway: shop was deleted meanwhile" in done.error
    assert await stores.agents.list() == []


async def test_an_editor_that_fails_or_is_not_there_saves_nothing(editor: Editor, put_agent: PutAgent) -> None:
    await put_agent("shop")
    failed = await editor.edit("file.write_text('{}'); sys.exit(3)")
    assert (failed.status, failed.error) == (1, "gateway: the editor ended with status 3: nothing is saved\n")
    missing = await editor.edit(VISUAL="", EDITOR="no-such-editor --wait")
    assert missing.error == "gateway: the editor cannot be run: no-such-editor --wait; set VISUAL or EDITOR\n"
    assert editor.drafts() == []


COMMANDS = ["", "serve", "worker", "migrate", "dev", "dead", "doctor", "settings", "agents"]
COMMANDS += [f"agents {action}" for action in ("put", "edit", "show", "list", "delete")]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_says_what_it_does(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*command.split(), "--help"])
    assert ended.value.code == 0
    usage, _, text = capsys.readouterr().out.partition("\n\n")
    assert usage.startswith(f"usage: gateway {command}".rstrip())
    assert re.match(r"[A-Z][^\n]{15,}\.\n", text), "a sentence"


@pytest.fixture
async def worker_process(
    stores: Stores, put_agent: PutAgent, tmp_path: Path, variables: dict[str, str]
) -> AsyncIterator[GatewayProcess]:
    """A worker that has flushed a record, so that it is known to be at work."""
    process = await GatewayProcess("worker", tmp_path, variables).start()
    await open_sessions(stores, put_agent, 1)
    await wait_for(lambda: "outbox.flushed" in process.output(), f"the first flush: {process.output()}", 30)
    yield process
    if process.process.poll() is None:
        process.kill()


async def open_sessions(stores: Stores, put_agent: PutAgent, count: int) -> None:
    """Opens sessions; each puts a record on the outbox."""
    agent = await put_agent("shop")
    for number in range(count):
        new = NewSession(
            id=f"01900000-0000-7000-8000-{number:06x}{count:06x}",
            session_id=new_session_id(),
            agent_id=agent.id,
            channel="text",
            website_domain="shop.example",
            user_id="",
            ip_address="127.0.0.1",
            user_agent="",
            metadata={},
            minted=True,
            hot_ttl_s=60,
        )
        await stores.sessions.open(new)


async def test_a_worker_told_to_stop_first_flushes_what_is_queued(
    worker_process: GatewayProcess, stores: Stores, put_agent: PutAgent, rows: Rows
) -> None:
    """Paused while the records are queued, so that none of them is flushed before the signal is there."""
    worker_process.signal(signal.SIGSTOP)
    await open_sessions(stores, put_agent, SESSIONS)
    assert len(await rows("SELECT * FROM agent_sessions")) == 1
    worker_process.signal(signal.SIGTERM)
    worker_process.signal(signal.SIGCONT)
    status = await asyncio.to_thread(worker_process.process.wait, 60)
    assert status == 0, worker_process.output()
    assert len(await rows("SELECT * FROM agent_sessions")) == 1 + SESSIONS
    assert await stores.client.xlen(stores.keys.outbox(0)) == 0


async def test_a_worker_that_is_killed_leaves_them_queued(
    worker_process: GatewayProcess, stores: Stores, put_agent: PutAgent, rows: Rows
) -> None:
    """The control: it is the draining that brings them into Postgres."""
    worker_process.signal(signal.SIGSTOP)
    await open_sessions(stores, put_agent, SESSIONS)
    worker_process.kill()
    assert len(await rows("SELECT * FROM agent_sessions")) == 1
    assert await stores.client.xlen(stores.keys.outbox(0)) == SESSIONS


@pytest.fixture
async def pod_process(
    stores: Stores, put_agent: PutAgent, tmp_path: Path, variables: dict[str, str]
) -> AsyncIterator[GatewayProcess]:
    """A pod that answers, with an agent whose graph fails."""
    await put_agent("broken", config={"delay_ms": "not a number"})
    await put_agent("shop")
    process = await GatewayProcess("serve", tmp_path, variables).start()
    yield process
    if process.process.poll() is None:
        process.kill()


async def test_a_log_never_has_what_visitors_say_or_their_secrets(pod_process: GatewayProcess) -> None:
    """Not when all goes well, and not when a graph fails: a traceback's variables hold all of it."""
    session_id, words = new_session_id(), "the-words-of-the-visitor"
    async with httpx.AsyncClient(base_url=pod_process.url, timeout=30) as client:
        assert (await post_message(client, session_id, words)).status_code == 200
        answer = await post_message(client, session_id + "2", words, agent="broken", metadata={"note": words})
        problem(answer, 502, "graph_failed")
    assert await asyncio.to_thread(pod_process.stop) == 0
    said = pod_process.output()
    assert "turn.completed" in said
    assert "graph.failed" in said
    for secret in (words, session_id, SECRET_KEY, ADMIN_KEY):
        assert secret not in said, f"the log has {secret!r}"


async def test_a_port_in_use_stops_a_pod_with_a_sentence(pod_process: GatewayProcess, variables: dict[str, str]) -> None:
    done = await run_gateway("serve", variables=variables | {"GATEWAY_PORT": str(pod_process.port)})
    assert done.status == 1
    assert done.error.splitlines()[-1] == f"gateway: cannot listen on 127.0.0.1:{pod_process.port}"
    assert "Traceback" not in done.error


def test_what_runs_in_production_does_not_load_the_servers_of_development() -> None:
    program = "import sys, gateway.cli; print([name for name in sys.modules if name.startswith('gateway.dev')])"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("arguments", ["settings", "settings --json"])
def test_a_reader_that_has_gone_ends_a_command_without_a_traceback(arguments: str) -> None:
    shell = f"{sys.executable} -m gateway {arguments} | head -n 1; echo ${{PIPESTATUS[0]}}"
    for _ in range(3):
        done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True, check=True)
        assert done.stderr == ""
        assert done.stdout.splitlines()[-1] in ("0", "1")
