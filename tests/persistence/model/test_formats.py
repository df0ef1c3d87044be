"""What the version before has stored is read by this one, and what the next one may add does not disturb it.

`data/formats/1` is what a real pod and worker left in Redis, one file per kind of key; `data/formats/2` has the same records
as format 2 has them. These samples are never made anew: a later version reads these very files.
"""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import msgspec
import pytest

from gateway.app import Stores
from gateway.settings import Settings
from persistence import flusher as flusher_module
from persistence.errors import UnsuitableRedis
from persistence.model.agents import AgentDefinition, decode_definition
from persistence.model.codec import decode_record
from persistence.redis.server_check import check_server
from persistence.worker import Worker
from tests.support.pods import fields_of
from tests.support.samples import FLUSHED, REFUSED, WAITING, Sample, load_sample, store_sample
from tests.support.serving import wait_for
from tests.support.sse import kinds, resume
from tests.support.stored import another, contents, entries_of, ttl_of
from tests.support.stored import say as say_in_redis
from tests.support.visiting import Flush, Rows, post_message, problem

HEADERS = {"Origin": "https://shop.example"}


def as_it_was_written(sample: Sample) -> None:
    """Nothing is changed."""


def as_the_next_version_may_write(sample: Sample) -> None:
    """A field, a member and a kind of event more, wherever there may be one; FORMAT is the same."""
    for key, stored in sample.items():
        value = stored["value"]
        if stored["type"] == "hash":
            _add_to_fields(value)
        elif stored["type"] == "stream":
            for fields in value.values():
                _add_to_fields(fields)
        if ":agent:" in key and "definition" in value:
            value["definition"] = _with_colour(value["definition"])


def _add_to_fields(fields: dict[str, str]) -> None:
    fields["colour"] = "blue"
    for name, text in fields.items():
        if name == "session" and text.startswith("{"):
            fields[name] = _with_colour(text)
        if (name == "turn" or name.startswith("t:")) and text.startswith("{"):
            turn = json.loads(text)
            for message in turn["messages"]:
                message["colour"] = "blue"
            fields[name] = _with_colour(_compact(turn))
        if name == "events":
            events = json.loads(text)
            kind = next(event for event in events if event[0] == "text.delta")
            kind[:] = ["mood.changed", {"mood": "sunny"}]
            fields[name] = _compact(events)


def _with_colour(text: str) -> str:
    return _compact({**json.loads(text), "colour": "blue"})


def _compact(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


@pytest.fixture(params=[1, 2], ids=["records-1", "records-2"])
def records(request: pytest.FixtureRequest) -> int:
    """The format of the records."""
    number: int = request.param
    return number


@pytest.fixture(params=[as_it_was_written, as_the_next_version_may_write], ids=lambda change: change.__name__)
async def sample(request: pytest.FixtureRequest, stores: Stores, records: int) -> Sample:
    """The samples, in Redis."""
    change: Callable[[Sample], None] = request.param
    sample = load_sample(records)
    change(sample)
    await store_sample(stores.client, sample)
    return sample


async def say(client: httpx.AsyncClient, session_id: str, message: str, message_id: str = "") -> dict[str, Any]:
    fields = {"message_id": message_id} if message_id else {}
    answer = await post_message(client, session_id, message, headers=HEADERS, **fields)
    assert answer.status_code == 200, answer.text
    answered: dict[str, Any] = answer.json()
    return answered


async def transcript(client: httpx.AsyncClient, session_id: str) -> list[str]:
    answer = await client.get(f"/api/sessions/{session_id}/messages", headers=HEADERS)
    assert answer.status_code == 200, answer.text
    return [message["content"] for message in answer.json()["messages"]]


def test_the_samples_have_every_kind_of_key_that_lasts() -> None:
    kinds_of_keys = {key.split(":")[2 if "{" in key else 1] for key in load_sample()}
    assert kinds_of_keys == {"session", "outbox", "dead", "fence", "live", "events", "agent", "meta"}


async def test_everything_stored_goes_on(
    sample: Sample, client: httpx.AsyncClient, stores: Stores, flush: Flush, rows: Rows
) -> None:
    said = ["Hello", "You said: Hello", "How are you?", "You said: How are you?"]
    assert await transcript(client, WAITING) == said

    again = await say(client, WAITING, "Hello", "m1")
    assert (again["response"], again["metadata"]["replayed"]) == ("You said: Hello", True)

    (log,) = (stored["value"] for key, stored in sample.items() if ":events:" in key)
    (turn_id,) = (key.split(":")[3] for key in sample if ":events:" in key)
    stored_kinds = [kind for fields in log.values() for kind, _ in json.loads(fields["events"])]
    async with resume(client, WAITING, turn_id, headers=HEADERS) as stream:
        while await stream.next():
            pass
    assert kinds(stream.events) == stored_kinds
    assert stream.events[-1].data["response"] == "You said: How are you?"

    new = await say(client, WAITING, "Still there?", "m3")
    assert (new["metadata"]["message_count"], new["metadata"]["history"]) == (6, 4)
    await flush()
    assert await contents(rows, WAITING) == [*said, "Still there?", "You said: Still there?"]
    assert await ttl_of(stores, WAITING) > 0

    assert (await say(client, FLUSHED, "Grüße", "m1"))["metadata"]["replayed"]
    assert (await say(client, FLUSHED, "And now?"))["metadata"]["message_count"] == 4
    assert await transcript(client, FLUSHED) == ["Grüße", "You said: Grüße", "And now?", "You said: And now?"]


async def test_a_stored_dead_letter_can_be_retried(
    sample: Sample, client: httpx.AsyncClient, stores: Stores, flush: Flush, rows: Rows
) -> None:
    (letter,) = await stores.outbox.dead_letters()
    assert (letter.session_id, letter.fact) == (REFUSED, "t:2")
    assert await ttl_of(stores, REFUSED) == -1
    assert await stores.outbox.retry_dead(letter)
    (put_back,) = [
        fields for _, fields in await entries_of(stores, stores.keys.outbox(0)) if fields[b"session_id"] == REFUSED.encode()
    ]
    (as_stored,) = sample["gw:{0}:dead"]["value"].values()
    expected = {name: value for name, value in as_stored.items() if name not in ("reason", "entry", "died_at", "bytes")}
    # Its size is counted anew, with what the outbox carries of it.
    assert int(put_back.pop(b"bytes")) > 0
    assert {name.decode(): value.decode() for name, value in put_back.items()} == expected, "also what is not known"
    await flush()
    assert await contents(rows, REFUSED) == ["Refuse this", "You said: Refuse this"]
    assert await ttl_of(stores, REFUSED) > 0


async def test_what_is_not_known_stays_where_it_is(stores: Stores, client: httpx.AsyncClient, flush: Flush) -> None:
    sample = load_sample()
    as_the_next_version_may_write(sample)
    await store_sample(stores.client, sample)
    await say(client, WAITING, "Still there?")
    await flush()
    fields = await fields_of(stores, WAITING)
    assert fields["colour"] == "blue"
    assert fields["t:1"] == sample[f"gw:{{0}}:session:{WAITING}"]["value"]["t:1"]


# ------------------------------------------------------------------------------------------------------- a later FORMAT


async def test_a_session_of_a_later_format_is_refused_and_left_as_it_is(stores: Stores, client: httpx.AsyncClient) -> None:
    await store_sample(stores.client, load_sample())
    key = stores.keys.session(WAITING)
    await stores.client.hset(key, "format", "2")
    before = await stores.client.hgetall(key)
    problem(await post_message(client, WAITING, headers=HEADERS), 500, "session_damaged")
    problem(await client.get(f"/api/sessions/{WAITING}/messages", headers=HEADERS), 500, "session_damaged")
    problem(await client.post(f"/api/sessions/{WAITING}/end", headers=HEADERS), 500, "session_damaged")
    assert await stores.client.hgetall(key) == before
    assert await ttl_of(stores, WAITING) == -1


@pytest.fixture
async def of_a_later_format(stores: Stores) -> AsyncIterator[bytes]:
    """The id of a record of which this version knows nothing but that it is of a later format."""
    outbox = stores.keys.outbox(0)
    entry = await stores.client.xadd(outbox, {"format": "3", "session_id": "session_of_tomorrow", "kind": "new"})
    assert isinstance(entry, bytes)
    yield entry
    await stores.client.xdel(outbox, entry)


async def test_a_record_of_a_later_format_waits_for_a_worker_that_can_read_it(
    stores: Stores, settings: Settings, worker: Worker, rows: Rows, of_a_later_format: bytes
) -> None:
    for number in range(3):
        await say_in_redis(stores, f"session_of_today_{number}")
        assert await worker.drain(10)
        assert len(await contents(rows, f"session_of_today_{number}")) == 2, "it delays nobody"
    assert await stores.outbox.dead_letters() == []
    assert [entry for entry, _ in await entries_of(stores, stores.keys.outbox(0))] == [of_a_later_format]

    async with another(settings, "of the later version") as later:

        async def is_given() -> bool:
            return of_a_later_format in [entry for entry, _ in (await later.outbox.take(0, 10, claim=True)).entries]

        await wait_for(is_given, "it is claimed, without waiting for a dead worker's time", 2)


async def test_without_that_it_would_be_a_dead_letter(
    stores: Stores, worker: Worker, of_a_later_format: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: a later format taken for damage."""

    class Unknown(Exception):
        pass

    monkeypatch.setattr(flusher_module, "NewerFormat", Unknown)
    assert await worker.drain(10)
    (letter,) = await stores.outbox.dead_letters()
    assert "format" in letter.reason


async def test_a_record_whose_format_is_no_number_is_damage(stores: Stores, worker: Worker) -> None:
    await stores.client.xadd(stores.keys.outbox(0), {"format": "zwei", "session_id": "session_of_nobody"})
    assert await worker.drain(10)
    (letter,) = await stores.outbox.dead_letters()
    assert "format" in letter.reason


async def test_a_store_of_a_later_format_is_refused_at_the_start(stores: Stores) -> None:
    await stores.client.hset(stores.keys.meta, "format", "2")
    with pytest.raises(UnsuitableRedis, match="format = 2"):
        await check_server(stores.client, stores.keys)


# ---------------------------------------------------------------------------------------------------------- the control


@pytest.mark.parametrize("field", ["unflushed", "rate_tat_ms", "revision"])
async def test_a_version_that_insists_on_a_field_it_has_added_reads_no_stored_session(
    stores: Stores, client: httpx.AsyncClient, field: str
) -> None:
    """Control: to a sample without a field that this version insists on, the test above would say so."""
    sample = load_sample()
    del sample[f"gw:{{0}}:session:{WAITING}"]["value"][field]
    await store_sample(stores.client, sample)
    answer = await client.get(f"/api/sessions/{WAITING}/messages", headers=HEADERS)
    problem(answer, 500, "session_damaged")
    await stores.client.delete(stores.keys.session(WAITING))


def test_stored_records_decode(records: int) -> None:
    for entry, fields in load_sample(records)["gw:{0}:outbox"]["value"].items():
        record = decode_record(entry.encode(), [part.encode() for pair in fields.items() for part in pair])
        assert record.session.session_id == WAITING


def test_an_operators_misspelt_setting_is_refused_but_a_later_versions_is_passed_over() -> None:
    """Control: with the strictness of the API, agents that a later version has put could not be read by this one."""
    sample = load_sample()
    as_the_next_version_may_write(sample)
    (raw,) = (stored["value"]["definition"] for stored in sample.values() if "definition" in stored["value"])
    assert decode_definition(raw, "stored").config == {"chunks": 3}
    with pytest.raises(msgspec.ValidationError, match="colour"):
        msgspec.json.decode(raw, type=AgentDefinition)
