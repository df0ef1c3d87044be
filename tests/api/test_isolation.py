"""No visitor ever gets, and no store ever keeps for a visitor, what another one said."""

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

import httpx
import msgspec
import pytest

from gateway.app import Stores
from persistence.worker import Worker
from tests.conftest import PutAgent
from tests.support.serving import wait_for
from tests.support.visiting import Flush, Rows, new_session_id, post_message, say

DOMAINS = [f"shop-{number}.example" for number in range(10)]
SESSIONS_PER_DOMAIN = 10
TURNS = 4


class Visitor(msgspec.Struct):
    """A visitor, where from, and the word that nobody else may ever see."""

    session_id: str
    domain: str
    secret: str

    @property
    def headers(self) -> dict[str, str]:
        return {"Origin": f"https://{self.domain}"}

    def foreign(self, where: str, text: str) -> list[str]:
        """Which others' secrets a text holds, in words."""
        found = set(re.findall(r"secret-\d{4}-end", text)) - {self.secret}
        return [f"{where} of {self.secret} has {other}" for other in sorted(found)]


@pytest.fixture
def visitors() -> list[Visitor]:
    places = [domain for domain in DOMAINS for _ in range(SESSIONS_PER_DOMAIN)]
    return [Visitor(new_session_id(), domain, f"secret-{number:04}-end") for number, domain in enumerate(places)]


@pytest.fixture
async def working(worker: Worker) -> AsyncIterator[None]:
    """A worker that works all the time."""
    task = asyncio.create_task(worker.run())
    yield
    worker.stop()
    await task


async def visit(client: httpx.AsyncClient, stores: Stores, visitor: Visitor) -> list[str]:
    """A whole conversation, with a look at the transcript and an eviction in between; others' secrets in answers."""
    leaks: list[str] = []
    for number in range(TURNS):
        words = f"turn {number}: {visitor.secret}"
        metadata = {"note": visitor.secret}
        given = await post_until_answered(client, visitor, words, message_id=f"m{number}", metadata=metadata)
        answer = given.json()
        leaks += visitor.foreign("an answer", repr(answer))
        assert answer["response"] == f"You said: {words}"
        assert answer["metadata"]["message_count"] == 2 * (number + 1)
        leaks += await look_at_transcript(client, visitor)
        key = stores.keys.session(visitor.session_id)
        if await stores.client.ttl(key) > 0:
            await stores.client.delete(key)
    return leaks


async def post_until_answered(client: httpx.AsyncClient, visitor: Visitor, words: str, **fields: Any) -> httpx.Response:
    """As a widget does it: a 503, which a busy machine may give, is tried again under the same message_id."""

    async def answered() -> httpx.Response | None:
        answer = await post_message(client, visitor.session_id, words, headers=visitor.headers, **fields)
        assert answer.status_code in (200, 503), answer.text
        return answer if answer.status_code == 200 else None

    answer: httpx.Response = await wait_for(answered, "an answer", 40)
    return answer


async def look_at_transcript(client: httpx.AsyncClient, visitor: Visitor) -> list[str]:
    answer = await client.get(f"/api/sessions/{visitor.session_id}/messages", headers=visitor.headers)
    assert answer.status_code == 503 or visitor.secret in answer.text
    return visitor.foreign("the transcript", answer.text)


async def look_into_stores(stores: Stores, rows: Rows, visitors: Sequence[Visitor]) -> list[str]:
    """Others' secrets in what Redis and Postgres keep for each visitor."""
    leaks = []
    messages = "SELECT m.* FROM agent_messages m JOIN agent_sessions s ON s.id = m.session_id WHERE s.session_id = $1"
    for visitor in visitors:
        fields = await stores.client.hgetall(stores.keys.session(visitor.session_id))
        leaks += visitor.foreign("the hash", repr(fields))
        stored: list[Any] = await rows("SELECT * FROM agent_sessions WHERE session_id = $1", visitor.session_id)
        stored += await rows(messages, visitor.session_id)
        leaks += visitor.foreign("a row", repr(stored))
    return leaks


async def test_a_hundred_sessions_at_once_never_see_each_other(
    client: httpx.AsyncClient,
    put_agent: PutAgent,
    stores: Stores,
    flush: Flush,
    rows: Rows,
    working: None,
    visitors: list[Visitor],
) -> None:
    await put_agent("shop", config={"delay_ms": 5}, history_window=4)
    leaks = await asyncio.gather(*(visit(client, stores, visitor) for visitor in visitors))
    assert [leak for of_visitor in leaks for leak in of_visitor] == []
    await flush()
    assert await look_into_stores(stores, rows, visitors) == []

    # Everything that was said is there, for whom it belongs to.
    counted = await rows(
        "SELECT s.website_domain, count(DISTINCT s.id), count(*) FROM agent_messages m"
        " JOIN agent_sessions s ON s.id = m.session_id GROUP BY 1 ORDER BY 1"
    )
    assert [tuple(row) for row in counted] == [
        (domain, SESSIONS_PER_DOMAIN, SESSIONS_PER_DOMAIN * TURNS * 2) for domain in DOMAINS
    ]


async def test_nobody_reads_a_session_from_another_website(
    client: httpx.AsyncClient, put_agent: PutAgent, visitors: list[Visitor]
) -> None:
    await put_agent("shop")
    owners = visitors[::SESSIONS_PER_DOMAIN]
    for owner in owners:
        await say(client, owner.session_id, owner.secret, headers=owner.headers)
    for owner in owners:
        for stranger in owners:
            path = f"/api/sessions/{owner.session_id}/messages"
            answer = await client.get(path, headers=stranger.headers)
            assert answer.status_code == (200 if stranger is owner else 404)
            assert stranger.foreign("a stranger's answer", answer.text) == []


async def test_the_check_sees_a_secret_that_was_planted(
    client: httpx.AsyncClient, put_agent: PutAgent, stores: Stores, flush: Flush, rows: Rows, visitors: list[Visitor]
) -> None:
    """The control: with one visitor's turn in the other's hash and row, all looks find it."""
    await put_agent("shop")
    victim, other = visitors[0], visitors[-1]
    for visitor in (victim, other):
        for _ in range(2):
            await say(client, visitor.session_id, visitor.secret, headers=visitor.headers)
    await flush()
    assert await look_into_stores(stores, rows, [victim, other]) == []

    turn = await stores.client.hget(stores.keys.session(other.session_id), "t:2")
    assert turn is not None
    await stores.client.hset(stores.keys.session(victim.session_id), "t:2", turn)
    await rows("UPDATE agent_messages SET content = $1 WHERE content = $2", other.secret, victim.secret)

    assert await look_at_transcript(client, victim) == [f"the transcript of {victim.secret} has {other.secret}"]
    assert await look_into_stores(stores, rows, [victim, other]) == [
        f"the hash of {victim.secret} has {other.secret}",
        f"a row of {victim.secret} has {other.secret}",
    ]
