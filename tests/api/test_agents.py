"""Agents over HTTP: what GET shows can be put back, PATCH changes what it names, and concurrent writes keep each other."""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import Any

import asyncpg
import httpx
import msgspec
import pytest
from structlog.testing import capture_logs

from gateway.agents import Agents, Document, differences, document_of, merge_patch
from gateway.app import Stores
from gateway.settings import Settings
from persistence.model.agents import Agent, AgentDefinition
from persistence.redis.agent_copies import AgentCopies
from tests.conftest import PutAgent
from tests.support.serving import ADMIN, wait_for
from tests.support.visiting import problem

SHOP = "/api/agents/shop"
GENERATED = 40
VALUES: dict[str, list[Any]] = {
    "config": [{}, {"delay_ms": 1}, {"delay_ms": 1, "nested": {"list": [{"null": None}], "null": None}, "null": None}],
    "allowed_domains": [[], ["shop.example", "*.shop.example"]],
    "channels": [["text"], ["phone", "voice"]],
    "history_window": [0, 2000],
    "hot_ttl_s": [1],
    "turn_timeout_s": [0.5, 60, 3600],
    "if_busy": ["queue", "reject", "interrupt"],
    "rate_limit": [None, {"messages": 1, "per_s": 1}],
    "agent_rate_limit": [None, {"messages": 1, "per_s": 86_400}],
    "domain_rate_limit": [None, {"messages": 1_000_000, "per_s": 1}],
    "max_running_turns": [None, 3],
    "turns_per_day": [None, 1000],
    "require_token": [True, False],
    "site_keys": [[], ["k" * 32], ["the newest key of this site, which signs", "ä".encode().hex() * 9]],
    "require_identity": [True, False],
    "active": [True, False],
    "truncate_ip": [True, False],
    "retention_days": [None, 1, 3650],
}


def definitions(seed: int = 1) -> list[Document]:
    """Definitions in which each field has each of its values, or is left out."""
    generator = random.Random(seed)
    made = []
    for _ in range(GENERATED):
        named = [name for name in VALUES if generator.random() < 0.6]
        made.append({"graph": "echo", **{name: generator.choice(VALUES[name]) for name in named}})
    return made


async def put(client: httpx.AsyncClient, path: str = SHOP, **body: Any) -> httpx.Response:
    return await client.put(path, json=body, headers=ADMIN)


async def patch(client: httpx.AsyncClient, path: str = SHOP, **body: Any) -> httpx.Response:
    return await client.patch(path, json=body, headers=ADMIN)


async def shown(client: httpx.AsyncClient, path: str = SHOP) -> Document:
    answer = await client.get(path, headers=ADMIN)
    assert answer.status_code == 200, answer.text
    document: Document = answer.json()
    return document


def test_the_generated_definitions_have_every_field() -> None:
    assert set(VALUES) | {"graph"} == set(AgentDefinition.__struct_fields__)
    made = definitions()
    for name, values in VALUES.items():
        assert all(any(one.get(name) == value for one in made) for value in values), name


@pytest.mark.parametrize("method", ["PUT", "PATCH"])
async def test_what_is_shown_can_be_written_back_and_changes_nothing(
    client: httpx.AsyncClient, stores: Stores, method: str
) -> None:
    for definition in definitions():
        assert (await put(client, **definition)).status_code in (200, 201)
        before, stored = await shown(client), await stores.agents.load_stored("shop")
        with capture_logs() as logs:
            for path in (SHOP, f"/api/agents/{before['id']}"):
                answer = await client.request(method, path, json=before, headers=ADMIN)
                assert (answer.status_code, answer.json()) == (200, before)
        assert await stores.agents.load_stored("shop") == stored, "site keys too, which are shown as fingerprints"
        assert [line["fields"] for line in logs if line["event"] == "audit.agent_put"] == [[], []]


async def test_an_id_or_name_that_is_another_agents_is_refused(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    shop, bank = await put_agent("shop"), await put_agent("bank")
    for write in (put, patch):
        for own in ({"id": shop.id}, {"name": "shop"}, {"id": shop.id, "name": "shop"}):
            assert (await write(client, graph="echo", **own)).status_code == 200
        wrong: list[Document] = [*({"id": value} for value in (bank.id, "", None, 1, shop.id.upper()))]
        wrong += [{"name": value} for value in ("bank", shop.id, None)]
        for other in wrong:
            (field,) = other
            problem(await write(client, graph="echo", **other), 422, "invalid_field", field)
    assert (await put(client, "/api/agents/new", graph="echo", name="new")).status_code == 201
    others: list[Document] = [{"id": shop.id}, {"id": None}, {"name": "another"}]
    for other in others:
        (field,) = other
        problem(await put(client, "/api/agents/newer", graph="echo", **other), 422, "invalid_field", field)


async def test_a_patch_changes_the_fields_it_names(client: httpx.AsyncClient, stores: Stores) -> None:
    key, newer = "a site key of thirty-two letters", "another site key, just as long as it"
    await put(
        client,
        graph="echo",
        config={"delay_ms": 1, "chunks": 2, "nested": {"a": 1, "b": 2}},
        allowed_domains=["shop.example"],
        site_keys=[key],
        retention_days=30,
        rate_limit=None,
    )
    known = await shown(client)
    steps: list[tuple[Document, Document]] = [
        ({}, {}),
        ({"history_window": 4}, {"history_window": 4}),
        (
            {"config": {"chunks": None, "nested": {"a": None, "c": 3}}},
            {"config": {"delay_ms": 1, "nested": {"b": 2, "c": 3}}},
        ),
        ({"config": {"nested": [1]}}, {"config": {"delay_ms": 1, "nested": [1]}}),
        ({"rate_limit": {"messages": 5, "per_s": 10}}, {"rate_limit": {"messages": 5, "per_s": 10}}),
        ({"rate_limit": {"messages": 6}}, {"rate_limit": {"messages": 6, "per_s": 10}}),
        ({"rate_limit": None, "retention_days": None}, {"rate_limit": None, "retention_days": None}),
        ({"history_window": None, "allowed_domains": None}, {"history_window": 50, "allowed_domains": []}),
        ({"config": None}, {"config": {}}),
    ]
    for changes, expected in steps:
        answer = await patch(client, **changes)
        known |= expected
        assert (answer.status_code, answer.json()) == (200, known), changes
        assert document_of(await stores.agents.load_stored("shop")) == known
    await patch(client, site_keys=[newer, known["site_keys"][0]])
    assert (await stores.agents.load_stored("shop")).definition.site_keys == (newer, key)


async def test_a_patch_that_is_wrong_is_refused_and_changes_nothing(client: httpx.AsyncClient) -> None:
    problem(await patch(client, history_window=4), 404, "agent_not_found")
    problem(await patch(client, "/api/agents/0196b6a2-0000-7000-8000-000000000000", active=False), 404, "agent_not_found")
    await put(client, graph="echo", config={"delay_ms": 1})
    before = await shown(client)
    cases: list[tuple[str, Document]] = [
        ("graf", {"graf": "echo"}),
        ("graf", {"graf": None}),
        ("graph", {"graph": None}),
        ("graph", {"graph": "nothing"}),
        ("history_window", {"history_window": "4"}),
        ("rate_limit", {"rate_limit": 1}),
        ("rate_limit.messages", {"rate_limit": {"messages": None}}),
        ("rate_limit.burst", {"rate_limit": {"burst": 1}}),
        ("agent_rate_limit.per_s", {"agent_rate_limit": {"messages": 1}}),
        ("config", {"config": []}),
        ("config", {"config": {"delay_ms": "long"}}),
        ("config.a", {"config": {"a": "\0"}}),
        ("allowed_domains", {"allowed_domains": ["a b"]}),
        ("site_keys", {"site_keys": ["sha256:000000000000"]}),
    ]
    for field, changes in cases:
        problem(await patch(client, **changes), 422, "invalid_field", field)
    deep = b'{"config":' + b'{"a":' * 900 + b"1" + b"}" * 901
    json_type = {"Content-Type": "application/json"}
    assert (await client.patch(SHOP, content=deep, headers=ADMIN | json_type)).status_code in (400, 422)
    for raw in (b"[]", b"null", b'"graph"'):
        problem(await client.patch(SHOP, content=raw, headers=ADMIN | json_type), 422, "invalid_field", "body")
    assert await shown(client) == before


async def test_a_patch_is_json_or_a_merge_patch(client: httpx.AsyncClient) -> None:
    await put(client, graph="echo")
    for media_type, status in (
        ("application/json", 200),
        ("application/merge-patch+json", 200),
        ("application/merge-patch+json; charset=utf-8", 200),
        ("application/json-patch+json", 415),
        ("text/plain", 415),
    ):
        answer = await client.patch(SHOP, content=b"{}", headers=ADMIN | {"Content-Type": media_type})
        assert answer.status_code == status, media_type
    merge_patch_type = {"Content-Type": "application/merge-patch+json"}
    problem(
        await client.put(SHOP, content=b'{"graph":"echo"}', headers=ADMIN | merge_patch_type), 415, "unsupported_media_type"
    )


async def test_an_agent_whose_graph_is_gone_can_be_switched_off(client: httpx.AsyncClient, put_agent: PutAgent) -> None:
    await put_agent("shop", graph="gone")
    assert (await patch(client, active=False)).json()["active"] is False
    problem(await patch(client, config={"delay_ms": 1}), 422, "invalid_field", "graph")
    problem(await patch(client, graph="gone too"), 422, "invalid_field", "graph")


# ------------------------------------------------------------------------------------------------------- concurrent writes


async def test_patches_at_once_keep_each_others_changes(
    client: httpx.AsyncClient, stores: Stores, put_agent: PutAgent
) -> None:
    agent = await put_agent("shop")
    count = 20
    answers = await asyncio.gather(*(patch(client, config={f"field_{number}": number}) for number in range(count)))
    assert [answer.status_code for answer in answers] == [200] * count
    expected = {f"field_{number}": number for number in range(count)}
    stored = await stores.agents.load_stored("shop")
    assert stored.definition.config == expected
    assert await stores.agent_copies.find(agent.id) == stored, "the copy that pods read"


Interrupted = Callable[[Stores], Awaitable[Document]]


@pytest.fixture
def interrupted(settings: Settings, put_agent: PutAgent) -> Interrupted:
    """The document after a write that began while another transaction was about to commit `history_window` 7."""

    async def write(stores: Stores) -> Document:
        agent = await put_agent("shop")
        other = await asyncpg.connect(settings.database_url)
        try:
            transaction = other.transaction()
            await transaction.start()
            definition = msgspec.structs.replace(agent.definition, history_window=7)
            await other.execute(
                "UPDATE agents SET definition = $1::text::jsonb WHERE name = 'shop'",
                msgspec.json.encode(definition).decode(),
            )
            writing = asyncio.create_task(
                stores.agents.write("shop", lambda stored: merge_patch(stored or {}, {"retention_days": 30}))
            )

            async def it_waits() -> bool:
                return bool(await other.fetchval("SELECT count(*) > 0 FROM pg_locks WHERE NOT granted"))

            await wait_for(it_waits, "the write waits for the row", 1)
            await transaction.commit()
            return document_of((await writing).agent)
        finally:
            await other.close()

    return write


async def test_a_write_sees_the_change_that_it_waited_for(stores: Stores, interrupted: Interrupted) -> None:
    document = await interrupted(stores)
    assert (document["history_window"], document["retention_days"]) == (7, 30)


async def test_without_the_lock_it_loses_that_change(stores: Stores, settings: Settings, interrupted: Interrupted) -> None:
    """The control: it is `lock_agent` that waits, before it reads."""
    careless = Stores(settings)
    statements = careless.postgres.statements
    statements["lock_agent"] = statements["find_agent"]
    try:
        document = await interrupted(careless)
        assert (document["history_window"], document["retention_days"]) == (50, 30)
    finally:
        await careless.close()


class SlowCopies(AgentCopies):
    """Copies of which the first write waits until it may go on."""

    def __init__(self, stores: Stores) -> None:
        super().__init__(stores.scripts, stores.keys)
        self.reached, self.go_on = asyncio.Event(), asyncio.Event()
        self.written: list[int] = []

    async def put(self, agent: Agent, old_name: str | None = None) -> None:
        if not self.reached.is_set():
            self.reached.set()
            await self.go_on.wait()
        await super().put(agent, old_name)
        self.written.append(agent.definition.history_window)


async def test_the_copy_of_a_later_write_is_not_overwritten_by_an_earlier_one(stores: Stores, put_agent: PutAgent) -> None:
    """The earlier one copies last here; it looks again whether its definition is still the stored one."""
    agent = await put_agent("shop")
    copies = SlowCopies(stores)
    earlier = Agents(copies, stores.postgres)
    writing = asyncio.create_task(earlier.put("shop", AgentDefinition(graph="echo", history_window=1)))
    await copies.reached.wait()
    await stores.agents.put("shop", AgentDefinition(graph="echo", history_window=2))
    copies.go_on.set()
    await writing
    assert copies.written == [1, 2]
    found = await stores.agent_copies.find(agent.id)
    assert found is not None
    assert found.definition.history_window == 2


async def test_an_agent_that_is_deleted_while_it_is_copied_has_no_copy(stores: Stores, put_agent: PutAgent) -> None:
    agent = await put_agent("shop")
    copies = SlowCopies(stores)
    writing = asyncio.create_task(Agents(copies, stores.postgres).put("shop", AgentDefinition(graph="echo")))
    await copies.reached.wait()
    await stores.agents.delete("shop")
    copies.go_on.set()
    await writing
    assert await stores.agent_copies.find(agent.id) is None


async def test_a_write_that_changes_nothing_leaves_the_row_alone(
    stores: Stores, put_agent: PutAgent, settings: Settings
) -> None:
    await put_agent("shop", config={"on": 1})
    connection = await asyncpg.connect(settings.database_url)
    try:
        version = await connection.fetchval("SELECT xmin::text FROM agents")
        await put_agent("shop", config={"on": 1})
        assert await connection.fetchval("SELECT xmin::text FROM agents") == version
        await put_agent("shop", config={"on": True})
        assert await connection.fetchval("SELECT xmin::text FROM agents") != version, "1 is not true"
    finally:
        await connection.close()
    assert (await stores.agents.load_stored("shop")).definition.config["on"] is True


# --------------------------------------------------------------------------------------------------------------- documents


def test_merging_follows_the_examples_of_rfc_7396() -> None:
    """Appendix A, as far as both sides are objects."""
    for target, changes, result in (
        ({"a": "b"}, {"a": "c"}, {"a": "c"}),
        ({"a": "b"}, {"b": "c"}, {"a": "b", "b": "c"}),
        ({"a": "b"}, {"a": {}}, {"a": {}}),
        ({"a": ["b"]}, {"a": "c"}, {"a": "c"}),
        ({"a": "c"}, {"a": ["b"]}, {"a": ["b"]}),
        ({"a": {"b": "c"}}, {"a": {"b": "d", "c": None}}, {"a": {"b": "d"}}),
        ({"a": [{"b": "c"}]}, {"a": [1]}, {"a": [1]}),
        ({"a": "b", "b": "c"}, {"a": None}, {"b": "c"}),
        ({}, {"a": {"bb": {"ccc": None}}}, {"a": {"bb": {}}}),
        ({"e": None}, {"a": 1}, {"e": None, "a": 1}),
    ):
        merged = merge_patch({"config": target}, {"config": changes})
        assert merged == {"config": result}, (target, changes)


def test_every_document_is_a_patch_of_itself_that_changes_nothing() -> None:
    for definition in definitions():
        assert merge_patch(definition, definition) == definition
        assert differences(definition, definition) == []


def test_differences_are_told_by_path() -> None:
    before = {"graph": "echo", "config": {"a": 1, "b": {"c": 1}}, "rate_limit": None, "active": 1}
    after = {"graph": "chat", "config": {"b": {"c": 2}, "d": 1}, "rate_limit": {"messages": 1}, "active": True}
    assert [tuple(one) for one in differences(before, after)] == [
        ("graph", "echo", "chat"),
        ("config.a", 1, msgspec.UNSET),
        ("config.b.c", 1, 2),
        ("config.d", msgspec.UNSET, 1),
        ("rate_limit", None, {"messages": 1}),
        ("active", 1, True),
    ]
