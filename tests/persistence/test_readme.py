"""persistence/README.md is true: its commands answer, its fields are those of a session, its map is the package."""

import re
import shlex
from collections.abc import AsyncIterator

import pytest

from gateway.dev.servers.redis import RedisServer
from tests.support.layer import Layer, redis_layer
from tests.support.serving import ROOT

PACKAGE = ROOT / "persistence"
README = (PACKAGE / "README.md").read_text()


@pytest.fixture
async def layer(redis_server: RedisServer) -> AsyncIterator[Layer]:
    async with redis_layer(redis_server.url) as layer:
        yield layer


async def test_every_command_shows_what_it_says(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.chat(session_id)
    begun, turn_id = await layer.begin(session_id)
    await layer.outbox.take(0, 10)
    commands = [shlex.split(line, comments=True)[1:] for line in README.splitlines() if line.startswith("    redis-cli")]
    assert len(commands) == 10
    for command in commands:
        words = [word.replace("session_1234567890_abc123xyz", session_id) for word in command]
        if "<turn_id>" in words[1] or words[1].endswith(":dead"):
            # Streamed turns and dead letters are not there; the keys' names are checked below.
            continue
        assert await layer.client.execute_command(*words) not in (None, 0, b"", [], {}), words
    await layer.sessions.abort(session_id, turn_id, begun.fence)
    known = {layer.keys.dead(0), layer.keys.events(session_id, "<turn_id>"), *layer.keys.permanent()}
    known.add(layer.keys.session("session_1234567890_abc123xyz"))
    assert {command[1] for command in commands} <= known


async def test_every_field_of_a_session_is_explained(layer: Layer) -> None:
    session_id = (await layer.open()).session_id
    await layer.chat(session_id)
    fields = {"t:<n>" if name.startswith("t:") else name for name in await layer.fields(session_id)}
    assert len(fields) > 25
    assert fields - set(re.findall(r"`([\w:<>]+)`", README)) == set()


def test_every_link_leads_somewhere() -> None:
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "//" not in link]
    assert len(links) > 25
    assert [link for link in links if not (PACKAGE / link).exists()] == []


def test_every_module_is_on_the_map() -> None:
    modules = {str(file.relative_to(PACKAGE)) for file in PACKAGE.rglob("*.py") if file.name != "__init__.py"}
    assert modules - set(re.findall(r"\]\(([^)]+)\)", README)) == set()
