"""What reads logs, metrics and errors learns no secret: unmistakable ones are put into every input, then all of it is read.

One pod and one worker, as processes of their own, go through successes and every kind of failure. The scene is played once;
each test looks for one kind of secret in what came of it.
"""

import asyncio
import json
import logging
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import httpx
import msgspec
import pytest
import pytest_asyncio
from structlog.testing import capture_logs

from gateway.app import Pod
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer
from gateway.logs import LibraryLogs
from persistence.model.fields import SESSION_FIELDS
from persistence.postgres.migrate import load_migrations, migrate
from persistence.postgres.postgres import Postgres
from persistence.redis.connection import Client, connect
from tests.conftest import PutAgent
from tests.support.commands import run_gateway
from tests.support.serving import ROOT, GatewayProcess, wait_for
from tests.support.visiting import new_session_id, problem, say

GRAPHS = ROOT / "tests" / "data" / "leaky" / "langgraph.json"

WORDS = "PLANTED-words-7c1d"
"""In every message; the other secrets by what they are."""
SECRETS = {
    "words of a visitor": WORDS,
    "metadata of a message": "PLANTED-metadata-41aa",
    "output of a model": "PLANTED-output-9e02",
    "context of a graph": "PLANTED-context-5b7f",
    "user agent": "PLANTED-agent-88c3",
    "idempotency key": "PLANTED-idempotency-1d9e",
    "message id": "PLANTED-message-id-6f20",
    "address of a recording": "PLANTED-audio-3a75",
    "user token": "PLANTED-user-token-c4d8",
    "wrong session token": "eyJPLANTED.session.token-77ab",
    "wrong admin key": "PLANTED-wrong-admin-key-e5f6",
    "config of an agent": "PLANTED-model-key-2b3c",
    "wrong value of a field": "PLANTED-value-f00d",
    "damaged field": "PLANTED-damage-a1b2",
    "record": "PLANTED-record-c3d4",
    "admin key": "PLANTED-admin-key-0011",
    "previous admin key": "PLANTED-admin-key-before-2233",
    "secret key": "PLANTED-secret-key-4455-0123456789abcdef",
    "previous secret key": "PLANTED-secret-key-before-6677-0123456789",
    "password of Redis": "PLANTED-redis-password-8899",
    "password of Postgres": "PLANTED-postgres-password-aabb",
    "end of a session id": "PLANTEDtail",
}
CHOSEN = f"session_1700000000000_{SECRETS['end of a session id']}"
ADMIN = {"Authorization": f"Bearer {SECRETS['admin key']}"}
FROM_ELSEWHERE = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
REDIS_USER = "planted"


class Scene(msgspec.Struct):
    """All that came out of it. `answers` are the statuses and codes by what was done, `problems` the bodies of errors."""

    output: dict[str, str] = {}
    metrics: str = ""
    problems: list[str] = []
    answers: dict[str, tuple[int, str]] = {}
    minted: dict[str, str] = {}
    events: set[str] = set()


def leaks(secret: str, scene: Scene) -> list[str]:
    """Where a secret is to be read."""
    places = {**scene.output, "metrics": scene.metrics, "problems": "\n".join(scene.problems)}
    return [f"{name}: {line[:400]}" for name, text in places.items() for line in text.splitlines() if secret in line]


class Player:
    """Does things to a pod, and notes what it is told."""

    def __init__(self, client: httpx.AsyncClient, scene: Scene) -> None:
        self._client = client
        self._scene = scene

    async def do(self, what: str, method: str, path: str, **request: Any) -> httpx.Response:
        answer = await self._client.request(method, path, **request)
        code = ""
        if answer.headers.get("content-type", "").startswith("application/problem"):
            self._scene.problems.append(answer.text + str(answer.headers))
            code = answer.json()["code"]
        self._scene.answers[what] = (answer.status_code, code)
        return answer

    async def say(self, mistake: str, session_id: str = "", *, kind: str = "message", **fields: Any) -> httpx.Response:
        body = {
            "message": f"{mistake} {WORDS}",
            "session_id": session_id or f"session_of_{mistake}_{SECRETS['end of a session id']}",
            "metadata": {
                "note": SECRETS["metadata of a message"],
                "output": SECRETS["output of a model"],
                "context": SECRETS["context of a graph"],
            },
            "audio_url": f"https://sounds.example/{SECRETS['address of a recording']}",
            **fields,
        }
        headers = {"User-Agent": SECRETS["user agent"]}
        return await self.do(mistake, "POST", f"/api/chat/leaky/{kind}", json=body, headers=headers)


def with_password(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    return parts._replace(netloc=f"{user}:{password}@{parts.netloc.rpartition('@')[2]}").geturl()


@asynccontextmanager
async def planted_stores(redis: RedisServer, postgres: PostgresServer) -> AsyncIterator[dict[str, str]]:
    """The environment of processes on stores that ask for passwords; a database of its own."""
    database = await asyncio.to_thread(postgres.create_database, "secrets")
    migrating = Postgres(database, timeout_s=30)
    await migrate(migrating, load_migrations())
    await migrating.close()
    client = connect(redis.url)
    await client.flushall()
    password = SECRETS["password of Redis"]
    await client.execute_command("ACL", "SETUSER", REDIS_USER, "reset", "on", f">{password}", "~*", "&*", "+@all")
    try:
        yield {
            "GATEWAY_REDIS_URL": with_password(redis.url, REDIS_USER, password),
            "GATEWAY_DATABASE_URL": with_password(database, "postgres", SECRETS["password of Postgres"]),
            "GATEWAY_SECRET_KEY": SECRETS["secret key"],
            "GATEWAY_SECRET_KEY_PREVIOUS": SECRETS["previous secret key"],
            "GATEWAY_ADMIN_KEY": SECRETS["admin key"],
            "GATEWAY_ADMIN_KEY_PREVIOUS": SECRETS["previous admin key"],
            "GATEWAY_GRAPHS": str(GRAPHS),
            "GATEWAY_TRUSTED_PROXIES": "127.0.0.1",
            "GATEWAY_LOG_LEVEL": "debug",
            "GATEWAY_LOG_FORMAT": "json",
        }
    finally:
        await client.execute_command("ACL", "DELUSER", REDIS_USER)
        await client.flushall()
        await client.aclose()


@pytest_asyncio.fixture(scope="module", loop_scope="session")
async def scene(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Scene]:
    """Everything that is looked at afterwards."""
    scene, directory = Scene(), tmp_path_factory.mktemp("secrets")
    async with planted_stores(redis_server, postgres_server) as environment:
        pod = GatewayProcess("serve", directory, environment)
        worker = GatewayProcess("worker", directory, environment)
        admin = connect(redis_server.url)
        database = await asyncpg.connect(environment["GATEWAY_DATABASE_URL"])
        try:
            definition = json.dumps(
                {"graph": "leaky", "config": {"api_key": SECRETS["config of an agent"]}, "rate_limit": None}
            )
            worker.spawn()
            putting = run_gateway("agents", "put", "leaky", "--definition", "-", variables=environment, stdin=definition)
            put, _ = await asyncio.gather(putting, pod.start())
            assert put.status == 0, put.error
            async with httpx.AsyncClient(base_url=pod.url, timeout=30) as client:
                player = Player(client, scene)
                await successes(player, scene)
                await failures(player)
                await strangers(player)
                bad_http(pod.port)
                await damage(player, admin)
                await flushed(admin)
                await refused_rows(player, admin, database, worker)
                retried = await run_gateway("dead", "--retry", variables=environment)
                await redis_troubles(player, admin, pod, worker)
                scene.metrics = (await client.get("/metrics")).text
            await asyncio.gather(*(asyncio.to_thread(process.stop) for process in (pod, worker)))
            scene.output = {"pod": pod.output(), "worker": worker.output()}
            for name, done in (("put", put), ("retry", retried)):
                scene.output[name] = done.out + done.error
        finally:
            await database.close()
            await admin.aclose()
            for process in (pod, worker):
                if process.started and process.process.poll() is None:
                    process.kill()
    for line in "\n".join(scene.output.values()).splitlines():
        if line.startswith("{"):
            scene.events.add(json.loads(line)["event"])
    yield scene


async def successes(player: Player, scene: Scene) -> None:
    for kind in ("message", "stream"):
        answer = await player.say("hello", CHOSEN, kind=kind, message_id=f"{SECRETS['message id']}-{kind}")
        assert answer.status_code == 200, answer.text
        assert all(SECRETS[f"{one}"] in answer.text for one in ("words of a visitor", "output of a model"))
    opened = (await player.do("mint", "POST", "/api/sessions", json={"agent_id": "leaky"})).json()
    scene.minted = opened
    bearer = {"Authorization": f"Bearer {opened['session_token']}", "Idempotency-Key": SECRETS["idempotency key"]}
    body = {"message": f"hello {WORDS}", "session_id": opened["session_id"], "metadata": {"output": "", "context": ""}}
    await player.do("a minted session", "POST", "/api/chat/leaky/message", json=body, headers=bearer)
    for path in (CHOSEN, f"{CHOSEN}/messages"):
        await player.do("an operator", "GET", f"/api/sessions/{path}", headers=ADMIN)
    await player.do("the list", "GET", "/api/sessions", headers=ADMIN)
    changed = {"graph": "leaky", "rate_limit": None, "config": {"api_key": SECRETS["config of an agent"], "more": 1}}
    await player.do("a change", "PUT", "/api/agents/leaky", json=changed, headers=ADMIN)


async def failures(player: Player) -> None:
    for mistake in ("raise", "group", "log", "warn", "task", "callback", "thread", "list", "nul"):
        await player.say(mistake)
    await player.say("raise", "session_of_stream_PLANTEDtail", kind="stream")
    # The same message id for other words, a message that waits for nobody.
    await player.say("other words", CHOSEN, message_id=f"{SECRETS['message id']}-message")


async def strangers(player: Player) -> None:
    """Requests that are wrong, each with the secret where the mistake is."""
    wrong, path = SECRETS["wrong value of a field"], "/api/chat/leaky/message"
    body: dict[str, Any] = {"message": WORDS, "session_id": CHOSEN}
    raw = json.dumps(body).encode()
    json_type = {"Content-Type": "application/json"}
    await player.do("invalid json", "POST", path, content=raw[:-1] + wrong.encode(), headers=json_type)
    await player.do("invalid utf-8", "POST", path, content=raw[:-2] + b'\xff"}', headers=json_type)
    await player.do("media type", "POST", path, content=raw, headers={"Content-Type": f"text/{wrong.lower()}"})
    await player.do("nul", "POST", path, json=body | {"message": f"{WORDS}\0"})
    for name in ("if_busy", "channel", "session_id", "metadata", "audio_duration_ms"):
        await player.do(f"wrong {name}", "POST", path, json=body | {name: f"{wrong} !"})
    await player.do("wrong message_id", "POST", path, json=body | {"message_id": f"{wrong} !"})
    await player.do("wrong key", "POST", path, json=body, headers={"Idempotency-Key": f"{wrong} !"})
    await player.do("wrong cursor", "GET", f"/api/sessions/{CHOSEN}/events", headers={"Last-Event-ID": wrong})
    await player.do("wrong limit", "GET", f"/api/sessions/{CHOSEN}/messages", params={"limit": wrong})
    await player.do("wrong list", "GET", "/api/sessions", params={"cursor": wrong}, headers=ADMIN)
    await player.do("wrong channel list", "GET", "/api/sessions", params={"channel": wrong}, headers=ADMIN)
    await player.do("wrong agent", "PUT", f"/api/agents/{wrong}!", json={"graph": "echo"}, headers=ADMIN)
    config = {"graph": "echo", "config": {"delay_ms": SECRETS["config of an agent"]}}
    await player.do("wrong config", "PUT", "/api/agents/wrong", json=config, headers=ADMIN)
    config = {"graph": "chat", "config": {"model": "m", "base_url": SECRETS["config of an agent"]}}
    await player.do("wrong base_url", "PUT", "/api/agents/wrong", json=config, headers=ADMIN)
    await player.do("user token", "POST", "/api/sessions", json={"agent_id": "leaky", "user_token": SECRETS["user token"]})
    for name in ("wrong session token", "wrong admin key"):
        headers = {"Authorization": f"Bearer {SECRETS[name]}"}
        await player.do(name, "GET", f"/api/sessions/{CHOSEN}", headers=headers)
        await player.do(f"{name} for all", "GET", "/api/sessions", headers=headers)
    headers = ADMIN | {"X-Forwarded-For": "203.0.113.9"}
    await player.do("admin key in plain", "GET", "/api/sessions", headers=headers)
    await player.do("a path", "GET", f"/nothing/{wrong}")


def bad_http(port: int) -> None:
    """What is no HTTP at all: uvicorn itself says so."""
    for raw in (
        f"GET /{WORDS} HTTP/9.9\r\n\r\n",
        f"{WORDS}\r\n\r\n",
        f"GET / HTTP/1.1\r\n{WORDS} : x\r\n\r\n",
        f"POST /api/sessions HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n{WORDS}\r\n",
        f"GET /{WORDS} HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n",
    ):
        with socket.create_connection(("127.0.0.1", port), timeout=5) as link:
            link.sendall(raw.encode())
            link.shutdown(socket.SHUT_WR)
            while link.recv(4096):
                pass


async def damage(player: Player, redis: Client) -> None:
    """What is stored is not what it should be; in its place stands somebody's text."""
    damaged, record = SECRETS["damaged field"], SECRETS["record"]
    fields = ("status", "channel", "metadata", "context", "started_at", "message_count", "turns", "minted", "id", "t:1")
    for field in fields:
        session_id = f"session_damaged_{field.replace(':', '_')}_PLANTEDtail"
        assert (await player.say("hello", session_id)).status_code == 200
        key = f"gw:{{0}}:session:{session_id}"
        await redis.hset(key, field, json.dumps({"id": damaged, "messages": [{"role": damaged}]}))
        await player.do(f"damaged {field}", "GET", f"/api/sessions/{session_id}/messages")
        await player.do(
            f"talked to damaged {field}",
            "POST",
            "/api/chat/leaky/message",
            json={"message": WORDS, "session_id": session_id},
        )
    found: dict[bytes, bytes] = await redis.execute_command("HGETALL", f"gw:{{0}}:session:{CHOSEN}")
    good = {name.decode(): value.decode() for name, value in found.items()}
    header = {"fact": "t:1", "turn": "{}", **{name: good[name] for name in SESSION_FIELDS.names}}
    for change in (
        {"fact": record},
        {"turn": record},
        {"turn": json.dumps({"id": record, "message_id": None, "seq": 1, "messages": [{"role": record}]})},
        {"status": record},
        {"minted": record},
        {"format": record},
        {"revision": record},
        {"context": record},
        {"id": record},
        {"started_at": record},
        {"started_at": f"{record}Z"},
    ):
        await redis.xadd("gw:{0}:outbox", header | change)  # type: ignore[arg-type]


async def flushed(redis: Client) -> None:
    async def empty() -> bool:
        return await redis.xlen("gw:{0}:outbox") == 0

    await wait_for(empty, "the outbox is empty", 20)


async def refused_rows(player: Player, redis: Client, database: asyncpg.Connection, worker: GatewayProcess) -> None:
    """Postgres refuses rows and quotes them: once as a rule that is broken, once as an error of its own."""
    await database.execute(
        "CREATE FUNCTION quote_it() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN RAISE EXCEPTION 'no: %', NEW.content USING ERRCODE = TG_ARGV[0], DETAIL = NEW.content; END $$"
    )
    for state, said in (("23514", "outbox.dead_letter"), ("P0001", "worker.flush_failed")):
        before = worker.output().count(said)
        await database.execute(
            f"CREATE TRIGGER quote BEFORE INSERT ON agent_messages FOR EACH ROW EXECUTE FUNCTION quote_it('{state}')"
        )
        await player.say("refused", f"session_refused_{state}_PLANTEDtail")

        def has_said(said: str = said, before: int = before) -> bool:
            return worker.output().count(said) > before

        await wait_for(has_said, f"the worker says {said}: {worker.output()[-2000:]}", 20)
        await database.execute("DROP TRIGGER quote ON agent_messages")
        await flushed(redis)


async def redis_troubles(player: Player, redis: Client, pod: GatewayProcess, worker: GatewayProcess) -> None:
    """Redis knows no scripts any more, then not even the user."""
    for rule in (("-@scripting",), ("off",)):
        await redis.execute_command("ACL", "SETUSER", REDIS_USER, *rule)
        if rule == ("off",):
            await redis.execute_command("CLIENT", "KILL", "USER", REDIS_USER)
        before = worker.output().count("_failed")
        await player.say("lost", f"session_of_{rule[0]}_PLANTEDtail".replace("@", ""))
        await player.do(f"read {rule[0]}", "GET", f"/api/sessions/{CHOSEN}")

        def troubled(before: int = before) -> bool:
            return worker.output().count("_failed") > before

        await wait_for(troubled, "the worker notices", 20)
        await redis.execute_command("ACL", "SETUSER", REDIS_USER, "on", "+@all")

        async def back() -> bool:
            return (await player.say("hello", CHOSEN)).status_code == 200

        await wait_for(back, "the pod works again", 20)


@pytest.mark.parametrize("what", SECRETS)
async def test_reading_secrets_in_logs_metrics_and_errors(scene: Scene, what: str) -> None:
    assert leaks(SECRETS[what], scene) == []


async def test_reading_the_ids_and_tokens_that_the_gateway_made(scene: Scene) -> None:
    for secret in (
        scene.minted["session_id"],
        scene.minted["session_token"],
        scene.minted["session_token"].split(".")[2],
        CHOSEN,
    ):
        assert leaks(secret, scene) == []


async def test_the_scene_had_every_kind_of_failure(scene: Scene) -> None:
    """Without which nothing would be proved."""
    assert scene.events >= {
        "turn.completed",
        "turn.failed",
        "graph.failed",
        "library.logged",
        "python.warning",
        "thread.crashed",
        "outbox.dead_letter",
        "outbox.flushed",
        "worker.flush_failed",
        "request.failed",
        "audit.agent_put",
        "audit.transcript_shown",
        "audit.dead_letter_retried",
        "admin.refused",
    }
    said = scene.output["pod"]
    for words in (
        "Task exception was never retrieved",
        "Exception in callback",
        "shop.graph",
    ):
        assert words in said
    expected = {
        "hello": (200, ""),
        "a minted session": (200, ""),
        "an operator": (200, ""),
        "raise": (200, ""),
        "group": (502, "graph_failed"),
        "list": (502, "graph_invalid_output"),
        "invalid json": (400, "invalid_json"),
        "wrong if_busy": (422, "invalid_field"),
        "wrong config": (422, "invalid_field"),
        "wrong session token": (401, "session_token_invalid"),
        "wrong admin key": (401, "session_token_invalid"),
        "wrong admin key for all": (401, "admin_key_required"),
        "admin key in plain": (403, "tls_required"),
        "damaged status": (500, "session_damaged"),
        "read off": (503, "redis_unavailable"),
    }
    assert {what: scene.answers[what] for what in expected} == expected


async def test_reading_secrets_from_a_crash(
    pod: Pod, client: httpx.AsyncClient, put_agent: PutAgent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A defect of the gateway itself, whose error quotes what it was working on: to the client, and in what uvicorn logs."""
    await put_agent("shop")
    session_id = new_session_id()
    await say(client, session_id, WORDS)
    crashes: list[str] = []

    async def crash(*arguments: Any) -> None:
        crashes.append(WORDS)
        raise RuntimeError(f"cannot work on {WORDS}") from ValueError(WORDS)

    with monkeypatch.context() as patched, capture_logs() as logs:
        patched.setattr(pod.history, "find_session", crash)
        patched.setattr(pod.stores.agents, "list", crash)
        patched.setattr(logging.getLogger(), "handlers", [LibraryLogs()])
        answers = [
            await client.get(f"/api/sessions/{session_id}"),
            await client.get("/api/agents", headers={"Authorization": f"Bearer {pod.settings.admin_key}"}),
        ]
    assert crashes == [WORDS, WORDS]
    for answer in answers:
        problem(answer, 500, "internal_error")
        assert WORDS not in answer.text
    assert WORDS not in str(logs)
    told = [(line["event"], line["error"]) for line in logs if "error" in line]
    assert told == [("request.crashed", "RuntimeError"), ("library.logged", "RuntimeError from ValueError")] * 2
    assert (await client.get(f"/api/sessions/{session_id}")).status_code == 200


async def test_every_line_of_a_log_is_one_event(scene: Scene) -> None:
    """So nobody can write lines of their own into it, or hide behind a traceback."""
    for name in ("pod", "worker"):
        for line in scene.output[name].splitlines():
            assert {"event", "level", "timestamp"} <= json.loads(line).keys(), line


async def test_a_secret_that_is_printed_is_found(
    redis_server: RedisServer, postgres_server: PostgresServer, tmp_path: Path
) -> None:
    """The control: with the guards of logs.py taken out of a copy of the source, the same words are in the log."""
    source = tmp_path / "source"
    for package in ("gateway", "persistence"):
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    logs = source / "gateway" / "logs.py"
    text = logs.read_text()
    for guard, without in (
        ("handlers=[LibraryLogs()]", "stream=sys.stderr"),
        ("    sys.excepthook = _on_crash\n", "    return\n"),
    ):
        assert guard in text
        text = text.replace(guard, without)
    logs.write_text(text)
    async with planted_stores(redis_server, postgres_server) as environment:
        pod = GatewayProcess("serve", tmp_path, environment, source=source)
        try:
            putting = run_gateway("agents", "put", "leaky", "--graph", "leaky", variables=environment)
            put, _ = await asyncio.gather(putting, pod.start())
            assert put.status == 0, put.error
            async with httpx.AsyncClient(base_url=pod.url, timeout=30) as client:
                player = Player(client, Scene())
                mistakes = ("log", "warn", "task", "callback", "thread", "print")
                for mistake in mistakes:
                    await player.say(mistake)
            await asyncio.to_thread(pod.stop)
        finally:
            if pod.started and pod.process.poll() is None:
                pod.kill()
        said = pod.output()
        for mistake in mistakes:
            assert f"{mistake} {WORDS}" in said, mistake
        assert leaks(WORDS, Scene({"pod": said}))
