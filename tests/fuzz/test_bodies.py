"""Broken bodies and broken requests over raw sockets against a real pod and a real worker: never a 5xx, never a dead letter,
and whatever was accepted reaches Postgres."""

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from uuid import UUID

import httpx
import msgspec
import pytest

from gateway.api import reading
from gateway.app import Stores, build_pod
from gateway.server.protocol import ConnectionLimits
from gateway.settings import Settings
from tests.conftest import PutAgent
from tests.fuzz.broken import Breaker
from tests.support.pods import gateway_process
from tests.support.raw import RawAnswer, RawConnection, request
from tests.support.serving import ADMIN, served, wait_for
from tests.support.visiting import Flush, Rows, new_session_id, post_message

BODIES = 20_000
HEADS = 3_000
CONNECTIONS = 8
HEAD_CONNECTIONS = 30
SEED = 7


class Outcome:
    """What became of the requests: how often each status, what was wrong, which turns and sessions were accepted."""

    def __init__(self) -> None:
        self.statuses: Counter[int] = Counter()
        self.wrong: list[str] = []
        self.turns: set[UUID] = set()
        self.sessions: set[str] = set()

    def note(self, raw: bytes, path: str, answer: RawAnswer | None) -> None:
        if answer is None:
            self.wrong.append(f"no answer to {raw[:200]!r}")
            return
        self.statuses[answer.status] += 1
        if answer.status >= 500 or (answer.status >= 400 and answer.code is None):
            self.wrong.append(f"{answer.status} to {raw[:200]!r}: {answer.body[:200]!r}")
        elif answer.status == 422 and not answer.json().get("field"):
            self.wrong.append(f"no field is named for {raw[:200]!r}: {answer.body[:200]!r}")
        elif path.endswith("/message") and answer.status == 200:
            self.turns.add(UUID(answer.json()["metadata"]["turn_id"]))
        elif path.endswith("/stream") and answer.status == 200:
            assert b"event: turn.completed" in answer.body, answer.body
            data = json.loads(answer.body.split(b"data: ")[1].split(b"\n")[0])
            self.turns.add(UUID(data["turn_id"]))
        elif answer.status == 201 and path == "/api/sessions":
            self.sessions.add(answer.json()["session_id"])


async def fuzz_bodies(url: str, number: int, seed: int = SEED) -> Outcome:
    """Sends broken bodies, some connections at a time, each kept alive."""
    breaker, outcome = Breaker(seed), Outcome()

    def requests() -> Iterator[tuple[bytes, str]]:
        for _ in range(number):
            method, path, valid = breaker.target()
            body = breaker.body(valid)
            yield request(path, body, method=method, headers=ADMIN if method == "PUT" else None), path

    source = requests()

    async def send() -> None:
        async with RawConnection(url) as connection:
            for raw, path in source:
                await connection.send(raw)
                outcome.note(raw, path, await connection.answer())

    await asyncio.gather(*[send() for _ in range(CONNECTIONS)])
    return outcome


@pytest.mark.timeout(600)
async def test_no_body_makes_a_5xx_or_a_dead_letter_and_what_was_accepted_is_stored(
    settings: Settings, stores: Stores, put_agent: PutAgent, rows: Rows, tmp_path: Path
) -> None:
    await put_agent("shop")
    async with gateway_process("serve", settings, tmp_path) as pod, gateway_process("worker", settings, tmp_path):
        outcome = await fuzz_bodies(pod.url, BODIES)
        assert outcome.wrong == []
        assert outcome.statuses.total() == BODIES
        # The mutations are neither all too crude nor all too gentle to say anything.
        assert min(outcome.statuses[status] for status in (200, 201, 400, 422)) > BODIES / 200, outcome.statuses

        async def all_flushed() -> bool:
            return (await stores.outbox.backlog(0)).records == 0

        await wait_for(all_flushed, "the worker has stored all", 60)
        assert await stores.outbox.dead_letters() == []
        assert {row[0] for row in await rows("SELECT turn_id FROM agent_messages")} == outcome.turns
        assert outcome.sessions <= {row[0] for row in await rows("SELECT session_id FROM agent_sessions")}
    print(f"{BODIES} bodies: {dict(sorted(outcome.statuses.items()))}; {len(outcome.turns)} turns stored")


async def test_without_the_check_for_nul_the_same_bodies_make_dead_letters_or_5xx(
    client: httpx.AsyncClient, stores: Stores, put_agent: PutAgent, flush: Flush, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The control."""
    await put_agent("shop")
    monkeypatch.setattr(reading, "find_unstorable", lambda *arguments: None)
    outcome = await fuzz_bodies(str(client.base_url), 500)
    await flush()
    dead = await stores.outbox.dead_letters()
    assert dead or outcome.wrong
    for letter in dead:
        key = stores.keys.session(letter.session_id)
        await stores.client.delete(key)
    await stores.client.delete(stores.keys.dead(0))


@pytest.mark.timeout(300)
async def test_no_head_makes_a_5xx_or_hangs(settings: Settings, stores: Stores, put_agent: PutAgent) -> None:
    """What is incomplete is waited for a moment, and then ended too."""
    await put_agent("shop")
    pod = await build_pod(msgspec.structs.replace(settings, body_timeout_s=0.2), stores)
    breaker, statuses, wrong = Breaker(SEED), Counter[str](), []
    async with served(pod, ConnectionLimits(head_s=0.2, linger_s=0.2), timeout_keep_alive=1) as client:

        async def send(number: int) -> None:
            for _ in range(number):
                raw = breaker.request() or b"\r\n"
                async with RawConnection(str(client.base_url)) as connection:
                    await connection.send(raw)
                    answer = await connection.answer(bodyless=raw.startswith(b"HEAD"))
                    if answer is not None and answer.status == 100:
                        answer = await connection.answer()
                    statuses[str(answer.status) if answer else "none"] += 1
                    if answer is None or answer.status >= 500:
                        wrong.append((raw, answer and answer.body))

        await asyncio.gather(*[send(HEADS // HEAD_CONNECTIONS) for _ in range(HEAD_CONNECTIONS)])
        assert wrong == []
        assert (await post_message(client, new_session_id())).status_code == 200
    assert await stores.outbox.dead_letters() == []
    print(f"{statuses.total()} requests: {dict(sorted(statuses.items()))}")
