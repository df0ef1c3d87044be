"""Damage is not absence: what cannot be read is an error that names the field, never an empty session. And what an
earlier version wrote is read."""

import json
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.app import Stores
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.redis import RedisServer
from persistence.errors import Damaged, DataRefused, PersistenceError, RedisUnavailable
from persistence.model.codec import decode_record, decode_session, decode_turn, encode_turn
from persistence.model.fields import SESSION_FIELDS
from persistence.model.session import Message, Record, Session, Turn, transcript
from persistence.model.times import iso, iso_from, moment
from persistence.redis.outcomes import Absent, Begun, Hot, Reconciled, Refused
from tests.support.layer import ACCESS, AGENT_ID, DOMAIN, OPERATOR, POLICY, Layer, new_id, new_turn, redis_layer
from tests.support.stored import store_records

BYTES = b"\xff\xfe\x00"
HEADER = SESSION_FIELDS.names
STATE = tuple(field.name for field in SESSION_FIELDS.state)

GARBAGE: list[tuple[str, str | bytes]] = [
    *((name, BYTES) for name in HEADER),
    ("format", "2"),
    ("format", ""),
    ("id", "not a uuid"),
    ("id", ""),
    ("session_id", ""),
    ("session_id", "session_of_somebody_else"),
    ("agent_id", "not a uuid"),
    ("channel", "smoke"),
    ("status", "asleep"),
    ("status", ""),
    ("started_at", "yesterday"),
    ("started_at", ""),
    ("last_activity_at", "yesterday"),
    ("last_activity_at", "2026-13-01T00:00:00.000Z"),
    ("ended_at", "tomorrow"),
    ("minted", "x"),
    ("minted", ""),
    ("context", "{"),
    ("context", "[]"),
    ("context", ""),
    ("metadata", "null"),
    *(
        (name, value)
        for name in ("message_count", "turns", "revision", "first_hot", "flushed", "hot_ttl_s")
        for value in ("", "many", "1.5", "-1", "nan", "inf")
        if (name, value) != ("turns", "inf")  # on a server of its own, below
    ),
    ("first_hot", "0"),
    ("first_hot", "4"),
    ("flushed", "3"),
    ("hot_ttl_s", "0"),
]
"""What no version ever writes into a session with two turns, one of them flushed."""

HOLDING: list[tuple[str, str | bytes]] = [
    ("turn_lease_until", "soon"),
    ("turn_lease_until", ""),
    ("turn_lease_until", BYTES),
    ("turn_fence", "x"),
    ("turn_fence", ""),
]
"""The same of a session that a turn holds."""


@pytest.fixture
async def layer(redis_server: RedisServer) -> AsyncIterator[Layer]:
    async with redis_layer(redis_server.url, checked=False) as layer:
        yield layer


@pytest.fixture
async def session_id(layer: Layer) -> str:
    """A session with two turns, the first of them flushed."""
    session_id = (await layer.open()).session_id
    await layer.chat(session_id, message_id="m1")
    await layer.flush()
    await layer.chat(session_id, message_id="m2")
    return session_id


async def damage(layer: Layer, session_id: str, field: str, value: str | bytes | None) -> None:
    if value is None:
        await layer.client.execute_command("HDEL", layer.keys.session(session_id), field)
    else:
        await layer.set(session_id, **{field: value})


async def compared(layer: Layer, session_id: str) -> None:
    """The session after a look into Postgres, which has none of it: it was stored before there were epochs."""
    absent = await layer.sessions.read(session_id, OPERATOR)
    assert isinstance(absent, Absent)
    assert await layer.sessions.reconcile(session_id, absent.ticket, None) is Reconciled.KEPT


async def begin(layer: Layer, session_id: str, message_id: str = "") -> Any:
    return await layer.sessions.begin(session_id, "new turn", OPERATOR, POLICY, message_id=message_id)


# ------------------------------------------------------------------------------------------------------------- the hash


@pytest.mark.parametrize("field", [name for name in (*HEADER, *STATE) if name not in ("epoch", "lease_ms")])
async def test_a_missing_field_is_damage(layer: Layer, session_id: str, field: str) -> None:
    await damage(layer, session_id, field, None)
    before = await undamaged(layer)
    for operation in (begin(layer, session_id), layer.sessions.read(session_id, OPERATOR, 10)):
        with pytest.raises(Damaged) as caught:
            await operation
        assert caught.value.field == field
    for change in (layer.sessions.end(session_id, OPERATOR), layer.sessions.time_out(session_id, 0)):
        with pytest.raises(Damaged):
            await change
    assert await undamaged(layer) == before, "and nothing was changed"


async def undamaged(layer: Layer) -> Any:
    """All that is stored but the counter of turns: one that was given up has taken a number."""
    stored = await layer.dump()
    return {key: value for key, value in stored.items() if not key.endswith("fence")}


@pytest.mark.parametrize(("field", "value"), GARBAGE)
async def test_garbage_in_a_field_is_damage(layer: Layer, session_id: str, field: str, value: str | bytes) -> None:
    await damage(layer, session_id, field, value)
    with pytest.raises(Damaged) as caught:
        await layer.sessions.read(session_id, OPERATOR, 10)
    assert caught.value.field == field
    with pytest.raises(Damaged) as caught:
        await begin(layer, session_id)
    assert caught.value.field == field


@pytest.mark.parametrize("value", ["inf", "1e300"])
async def test_a_damaged_number_does_not_stop_the_server(tmp_path: Path, value: str) -> None:
    """A script that counts up to it would run for ever, and nothing else runs on a Redis meanwhile."""
    with RedisServer(tmp_path, free_port(), config={"appendonly": "no"}) as server:
        async with redis_layer(server.url, checked=False) as layer:
            session_id = (await layer.open()).session_id
            await damage(layer, session_id, "turns", value)
            with suppress(PersistenceError):
                await begin(layer, session_id)
            try:
                await layer.open()
            except RedisUnavailable:
                server.kill()  # it would not stop otherwise
                raise


@pytest.mark.parametrize(("field", "value"), HOLDING)
async def test_garbage_in_what_a_turn_holds_is_damage(layer: Layer, session_id: str, field: str, value: str | bytes) -> None:
    await layer.begin(session_id)
    await damage(layer, session_id, field, value)
    before = await layer.dump()
    with pytest.raises(Damaged) as caught:
        await begin(layer, session_id)
    assert caught.value.field == field
    assert await layer.dump() == before, "and nobody took the session from the turn that may be running"


@pytest.mark.parametrize(("field", "value"), HOLDING[:3])
async def test_a_damaged_lease_does_not_stop_the_housekeeping_of_others(
    layer: Layer, session_id: str, field: str, value: str | bytes
) -> None:
    await layer.begin(session_id)
    await damage(layer, session_id, field, value)
    try:
        await layer.sessions.reap(session_id)
    except Damaged as error:
        assert error.field == field


@pytest.mark.parametrize("value", ["soon", BYTES, "nan"])
async def test_a_damaged_rate_limit_is_not_no_rate_limit(layer: Layer, session_id: str, value: str | bytes) -> None:
    await damage(layer, session_id, "rate_tat_ms", value)
    policy = msgspec.structs.replace(POLICY, rate_messages=1, rate_per_s=600)
    with pytest.raises(Damaged) as caught:
        await layer.sessions.begin(session_id, "x", ACCESS, policy)
    assert caught.value.field == "rate_tat_ms"


@pytest.mark.parametrize("value", ["x", "", "2", BYTES])
async def test_damage_does_not_open_a_session_that_needs_its_token(layer: Layer, value: str | bytes) -> None:
    session_id = (await layer.open(minted=True)).session_id
    await damage(layer, session_id, "minted", value)
    with pytest.raises(Damaged):
        await layer.sessions.read(session_id, ACCESS)


@pytest.mark.parametrize("message_id", ["", "m1", "another"])
@pytest.mark.parametrize(
    "value",
    [
        None,
        b"",
        b"{",
        b"null",
        b"[]",
        b"7",
        BYTES,
        b'{"message_id":"m1"',
        b'{"message_id":"m1"}',
        b'["message_id":"m1"]',
        b'{"id":"x","message_id":"m1","seq":1,"messages":[{}]}',
        b'{"id":"x","message_id":"m1","seq":1,"messages":[{"id":"y","role":"robot","content":"","created_at":""}]}',
    ],
)
async def test_a_damaged_turn_is_not_a_missing_one(
    layer: Layer, session_id: str, value: bytes | None, message_id: str
) -> None:
    await damage(layer, session_id, "t:1", value)
    with pytest.raises(Damaged) as caught:
        await layer.sessions.read(session_id, OPERATOR, 10)
    assert caught.value.field == "t:1"
    with pytest.raises(Damaged) as caught:
        await begin(layer, session_id, message_id)
    assert caught.value.field == "t:1"


async def test_a_hash_with_nothing_known_in_it_is_damage(layer: Layer) -> None:
    session_id = new_id()
    await layer.set(session_id, other="x")
    for operation in (begin(layer, session_id), layer.sessions.read(session_id, OPERATOR)):
        with pytest.raises(Damaged) as caught:
            await operation
        assert caught.value.field == "format"


async def test_what_is_damaged_is_named_without_the_visitors_key(layer: Layer, session_id: str) -> None:
    await damage(layer, session_id, "turns", None)
    with pytest.raises(Damaged) as caught:
        await begin(layer, session_id)
    assert session_id not in str(caught.value)
    assert session_id[:-10] in str(caught.value)


@pytest.mark.parametrize("field", ["revision", "flushed", "first_hot", "unflushed"])
async def test_a_commit_onto_damage_changes_nothing(layer: Layer, session_id: str, field: str) -> None:
    begun, turn_id = await layer.begin(session_id)
    await damage(layer, session_id, field, None if field == "unflushed" else "x")
    before = await layer.dump()
    with pytest.raises(Damaged) as caught:
        await layer.commit(begun, new_turn(begun, turn_id))
    assert caught.value.field == field
    assert await layer.dump() == before


async def test_what_is_damaged_while_a_turn_runs_is_made_good_by_its_commit(layer: Layer, session_id: str) -> None:
    """The turn knows the session as begin found it, and what it commits is all of that."""
    begun, turn_id = await layer.begin(session_id)
    await damage(layer, session_id, "message_count", "x")
    assert await layer.commit(begun, new_turn(begun, turn_id))
    assert isinstance(hot := await layer.sessions.read(session_id, OPERATOR, 10), Hot)
    assert hot.session.message_count == 6


async def test_a_damaged_session_is_kept_when_its_records_are_flushed(layer: Layer, session_id: str) -> None:
    await damage(layer, session_id, "turns", "x")
    await layer.flush()
    assert not await layer.has_ttl(session_id)
    assert (await layer.fields(session_id))["turns"] == "x"


@pytest.mark.parametrize("field", [name for name in (*HEADER, *STATE) if name != "id"])
@pytest.mark.parametrize("value", [None, BYTES])
async def test_a_damaged_session_can_be_erased(layer: Layer, session_id: str, field: str, value: bytes | None) -> None:
    """The visitor's right does not depend on the state of our data: what goes to Postgres must be readable there."""
    await layer.flush()
    session_uuid = (await layer.fields(session_id))["id"]
    await damage(layer, session_id, field, value)
    if field == "epoch" and value is None:
        await compared(layer, session_id)
    assert await layer.sessions.erase(session_id, OPERATOR) == session_uuid
    (record,) = await layer.take()
    assert (record.session.id, record.session.status) == (session_uuid, "erased")
    assert isinstance(await begin(layer, session_id), Refused)


class Forgiving(msgspec.Struct):
    """Control: a reader that takes what it can and defaults the rest."""

    status: str
    turns: int
    history: list[Turn]

    @classmethod
    async def read(cls, layer: Layer, session_id: str) -> "Forgiving":
        fields = await layer.client.execute_command("HGETALL", layer.keys.session(session_id))
        turns = int(fields.get(b"turns", 0)) if fields.get(b"turns", b"0").isdigit() else 0
        raw = [fields.get(f"t:{number}".encode()) for number in range(1, turns + 1)]
        return cls(fields.get(b"status", b"active").decode(), turns, [decode_turn(one, "", "") for one in raw if one])


@pytest.mark.parametrize("value", [None, "x"])
async def test_a_forgiving_reader_would_show_an_empty_session(layer: Layer, session_id: str, value: str | None) -> None:
    """Control: without the checks the visitor starts from nothing, and the next commit would overwrite turn 1."""
    await damage(layer, session_id, "turns", value)
    forgiving = await Forgiving.read(layer, session_id)
    assert (forgiving.turns, forgiving.history) == (0, [])
    with pytest.raises(Damaged):
        await layer.sessions.read(session_id, OPERATOR, 10)


# ----------------------------------------------------------------------------------------------------------- the record


RECORD_1: dict[str, str] = {
    "fact": "t:2",
    "turn": json.dumps(
        {
            "id": "01900000-0000-7000-8000-000000000102",
            "message_id": "m2",
            "seq": 3,
            "messages": [
                {
                    "id": "01900000-0000-7000-8000-000000000203",
                    "role": "user",
                    "content": "Grüße",
                    "created_at": "2026-01-01T00:00:01.000Z",
                    "metadata": {"page": "/"},
                },
                {
                    "id": "01900000-0000-7000-8000-000000000204",
                    "role": "assistant",
                    "content": "Hello",
                    "created_at": "2026-01-01T00:00:02.000Z",
                    "tokens_used": 7,
                    "latency_ms": 12,
                    "model_used": "m",
                },
            ],
            "metadata": {"history": 2},
        },
        ensure_ascii=False,
        separators=(",", ":"),
    ),
    "format": "1",
    "id": "01900000-0000-7000-8000-000000000001",
    "session_id": "session_1234567890_abc123xyz",
    "agent_id": AGENT_ID,
    "channel": "text",
    "status": "active",
    "user_id": "",
    "website_domain": DOMAIN,
    "ip_address": "192.0.2.1",
    "user_agent": "Mozilla/5.0",
    "started_at": "2026-01-01T00:00:00.000Z",
    "last_activity_at": "2026-01-01T00:00:02.000Z",
    "ended_at": "",
    "message_count": "4",
    "context": '{"step":2}',
    "metadata": '{"page":"/"}',
    "minted": "0",
    "turns": "2",
    "revision": "3",
}
"""An outbox entry as format 1 was first written. It never changes: what is stored out there does not either."""

HASH_1: dict[str, str] = {
    **{name: RECORD_1[name] for name in HEADER},
    "first_hot": "2",
    "flushed": "1",
    "unflushed": "t:2@1767225602000-0",
    "hot_ttl_s": "1800",
    "turn": "",
    "turn_fence": "",
    "turn_lease_until": "",
    "turn_message_id": "",
    "waiting": "",
    "rate_tat_ms": "1767225604000",
    "t:2": RECORD_1["turn"],
}
"""A session hash as format 1 was first written."""


RECORD_2: dict[str, str] = {
    "format": "2",
    "session_id": "session_1234567890_abc123xyz",
    "fact": "t:2",
    "session": '{"id":"01900000-0000-7000-8000-000000000001","session_id":"session_1234567890_abc123xyz",'
    f'"agent_id":"{AGENT_ID}","channel":"text","status":"active","user_id":"","website_domain":"{DOMAIN}",'
    '"ip_address":"192.0.2.1","user_agent":"Mozilla/5.0","started_at":"2026-01-01T00:00:00.000Z",'
    '"last_activity_at":"2026-01-01T00:00:02.000Z","ended_at":"","message_count":4,"context":{"step":2},'
    '"metadata":{"page":"/"},"minted":false,"turns":2,"revision":3}',
    "turn": RECORD_1["turn"],
    "bytes": "960",
}
"""An outbox entry as format 2 was first written."""


def entry(fields: dict[str, Any]) -> list[bytes]:
    return [part if isinstance(part, bytes) else part.encode() for pair in fields.items() for part in pair]


def expected_turn() -> Turn:
    return Turn(
        "01900000-0000-7000-8000-000000000102",
        "m2",
        3,
        [
            Message(
                "01900000-0000-7000-8000-000000000203", "user", "Grüße", "2026-01-01T00:00:01.000Z", metadata={"page": "/"}
            ),
            Message(
                "01900000-0000-7000-8000-000000000204",
                "assistant",
                "Hello",
                "2026-01-01T00:00:02.000Z",
                tokens_used=7,
                latency_ms=12,
                model_used="m",
            ),
        ],
        {"history": 2},
    )


def check_session(session: Session) -> None:
    assert (session.id, session.turns, session.revision, session.message_count) == (RECORD_1["id"], 2, 3, 4)
    assert (session.context, session.metadata, session.minted) == ({"step": 2}, {"page": "/"}, False)
    assert (session.started_at, session.website_domain) == ("2026-01-01T00:00:00.000Z", DOMAIN)


def test_a_stored_record_of_format_1_is_read() -> None:
    record = decode_record(b"1767225602000-0", entry(RECORD_1))
    assert (record.entry, record.fact, record.turn) == ("1767225602000-0", "t:2", expected_turn())
    check_session(record.session)


def test_a_stored_record_of_format_2_is_read() -> None:
    record = decode_record(b"1767225602000-0", entry(RECORD_2))
    before = decode_record(b"1767225602000-0", entry(RECORD_1))
    assert record == msgspec.structs.replace(before, bytes=int(RECORD_2["bytes"]))
    check_session(record.session)


def test_a_stored_record_that_carries_its_bytes_is_read() -> None:
    """As written since the bytes of the outbox are counted."""
    counted = {**RECORD_1, "bytes": "867"}
    record = decode_record(b"1767225602000-0", entry(counted))
    assert record.bytes == 867
    assert msgspec.structs.replace(record, bytes=0) == decode_record(b"1767225602000-0", entry(RECORD_1))


def test_a_record_with_fields_of_a_later_version_is_read() -> None:
    turn = json.loads(RECORD_1["turn"])
    later = {**RECORD_1, "turn": json.dumps({**turn, "colour": "blue"}), "colour": "blue"}
    assert decode_record(b"1-0", entry(later)).turn == expected_turn()


async def test_a_stored_hash_of_format_1_is_read_and_goes_on(layer: Layer) -> None:
    session_id = HASH_1["session_id"]
    await layer.set(session_id, **HASH_1)
    await compared(layer, session_id)
    hot = await layer.read(session_id)
    check_session(hot.session)
    assert (hot.first, hot.turns, hot.flushed, hot.ttl_ms) == (2, [expected_turn()], 1, -1)
    replay = await begin(layer, session_id, "m2")
    assert replay.turn == expected_turn()
    begun, turn_id = await layer.begin(session_id)
    assert await layer.commit(begun, new_turn(begun, turn_id)) is not None
    (record,) = await layer.take()
    assert (record.fact, record.session.revision, record.session.message_count) == ("t:3", 4, 6)
    old = Record("1767225602000-0", "t:2", record.session, None)
    await layer.outbox.mark_flushed(0, [old, record], 1)
    assert await layer.has_ttl(session_id)


@pytest.mark.parametrize("field", RECORD_1)
def test_a_record_without_a_field_is_damage(field: str) -> None:
    with pytest.raises(Damaged, match=field):
        decode_record(b"1-0", entry({name: value for name, value in RECORD_1.items() if name != field}))


RECORD_GARBAGE: list[tuple[str, str | bytes]] = [
    *((name, BYTES) for name in RECORD_1),
    ("fact", ""),
    ("fact", "t:"),
    ("fact", "t:x"),
    ("fact", "t:0"),
    ("fact", "a,b"),
    ("fact", "a b"),
    ("turn", ""),
    ("turn", "{}"),
    ("format", "3"),
    ("id", "x"),
    ("session_id", ""),
    ("agent_id", "x"),
    ("channel", "smoke"),
    ("status", "asleep"),
    ("started_at", "x"),
    ("started_at", ""),
    ("started_at", "2026-01-01T00:00:00"),
    ("last_activity_at", "x"),
    ("ended_at", "x"),
    ("message_count", "x"),
    ("turns", "1.5"),
    ("revision", ""),
    ("context", "[]"),
    ("metadata", "x"),
    ("minted", "x"),
]


@pytest.mark.parametrize(("field", "value"), RECORD_GARBAGE)
def test_garbage_in_a_record_is_damage(field: str, value: str | bytes) -> None:
    with pytest.raises(Damaged) as caught:
        decode_record(b"1-0", entry({**RECORD_1, field: value}))
    assert caught.value.field == field


SESSION_2: dict[str, Any] = json.loads(RECORD_2["session"])


@pytest.mark.parametrize("field", [name for name in RECORD_2 if name != "bytes"])
def test_a_record_of_format_2_without_a_field_is_damage(field: str) -> None:
    with pytest.raises(Damaged) as caught:
        decode_record(b"1-0", entry({name: value for name, value in RECORD_2.items() if name != field}))
    assert caught.value.field == field


@pytest.mark.parametrize("field", SESSION_2)
def test_a_record_whose_session_lacks_a_field_is_damage(field: str) -> None:
    session = json.dumps({name: value for name, value in SESSION_2.items() if name != field})
    with pytest.raises(Damaged) as caught:
        decode_record(b"1-0", entry({**RECORD_2, "session": session}))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, BYTES) for name in RECORD_2 if name != "bytes"),
        ("fact", ""),
        ("fact", "t:0"),
        ("fact", "a,b"),
        ("turn", ""),
        ("turn", "{}"),
        ("format", "3"),
        ("format", "02"),
        ("session", ""),
        ("session", "[]"),
        ("session", "null"),
        ("session", "{"),
        ("session_id", ""),
        ("session_id", "session_of_somebody_else"),
    ],
)
def test_garbage_in_a_record_of_format_2_is_damage(field: str, value: str | bytes) -> None:
    with pytest.raises(Damaged) as caught:
        decode_record(b"1-0", entry({**RECORD_2, field: value}))
    assert caught.value.field == field


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *((name, None) for name in SESSION_2),
        *((name, 1) for name in SESSION_2 if name not in ("message_count", "turns", "revision")),
        ("id", "x"),
        ("agent_id", "x"),
        ("channel", "smoke"),
        ("channel", ""),
        ("status", "asleep"),
        ("started_at", "x"),
        ("started_at", "2026-01-01T00:00:00"),
        ("last_activity_at", ""),
        ("ended_at", "x"),
        ("message_count", "4"),
        ("turns", 1.5),
        ("turns", 2**31),
        ("turns", -1),
        ("revision", -1),
        ("revision", 2**63),
        ("context", []),
        ("metadata", "x"),
        ("minted", "1"),
    ],
)
async def test_what_is_wrong_with_a_session_in_a_record_of_format_2_is_seen_before_it_is_stored(
    stores: Stores, field: str, value: Any
) -> None:
    """When it is read, or by Postgres: it is never stored as something else."""
    session = json.dumps({**SESSION_2, field: value})
    try:
        record = decode_record(b"1-0", entry({**RECORD_2, "session": session}))
    except Damaged as error:
        assert error.field == field
    else:
        with pytest.raises(DataRefused):
            await store_records(stores, [record])


async def test_a_session_that_lost_its_channel_and_agent_is_erased_by_a_record_of_format_2(stores: Stores) -> None:
    session = json.dumps({**SESSION_2, "status": "erased", "channel": "", "agent_id": ""})
    await store_records(
        stores, [decode_record(b"1-0", entry({**RECORD_2, "fact": "erased:3", "turn": "", "session": session}))]
    )


@pytest.mark.parametrize("fact", ["", "a b", "a,b"])
async def test_a_record_with_a_damaged_fact_does_not_stay_on_the_outbox_for_ever(layer: Layer, fact: str) -> None:
    """What decodes is flushed and marked: then it must leave the outbox, or its worker takes it again without end."""
    raw = [part for pair in {**RECORD_1, "fact": fact, "turn": ""}.items() for part in pair]
    await layer.client.execute_command("XADD", layer.keys.outbox(0), "*", *raw)
    ((number, fields),) = (await layer.outbox.take(0, 10)).entries
    try:
        record = decode_record(number, fields)
    except Damaged:
        await layer.outbox.dead_letter(0, number.decode(), "", fact, "a test")
    else:
        await layer.outbox.mark_flushed(0, [record], 1)
    assert not await layer.client.execute_command("XLEN", layer.keys.outbox(0))


@pytest.mark.parametrize("fields", [[], [b"fact"], [b"fact", b"t:1"], [b"a", b"b", b"c"]])
def test_an_entry_that_is_no_record_is_damage(fields: Sequence[bytes]) -> None:
    with pytest.raises(Damaged):
        decode_record(b"1-0", fields)


# -------------------------------------------------------------------------------------------------------- small readers


def test_a_header_of_another_length_is_damage() -> None:
    with pytest.raises(Damaged, match="header"):
        decode_session([b"1"], "here")


def test_a_header_with_a_missing_value_is_damage() -> None:
    values: list[Any] = [RECORD_1[name].encode() for name in HEADER]
    values[HEADER.index("status")] = None
    with pytest.raises(Damaged) as caught:
        decode_session(values, "here")
    assert caught.value.field == "status"


def test_a_turn_survives_its_storage() -> None:
    turn = expected_turn()
    assert decode_turn(encode_turn(turn), "here", "t:2") == turn
    assert b"audio_url" not in encode_turn(turn), "what is not known takes no room"


def test_a_transcript_numbers_its_messages() -> None:
    messages = transcript(expected_turn(), 2)
    assert [(one.seq, one.turn, one.role, one.message_id) for one in messages] == [
        (3, 2, "user", "m2"),
        (4, 2, "assistant", None),
    ]
    assert messages[1].tokens_used == 7


@pytest.mark.parametrize(
    "ms", [0, 1, 999, 1_767_225_599_999, 1_767_225_600_000, 253_402_300_799_999, *range(0, 10**13, 77_777_777_777)]
)
def test_timestamps_are_whole_milliseconds(ms: int) -> None:
    text = iso(ms)
    assert len(text) == 24
    assert iso_from(moment(text)) == text
    assert round(moment(text).timestamp() * 1000) == ms


def test_damage_is_one_of_this_packages_errors() -> None:
    assert issubclass(Damaged, PersistenceError)


async def test_an_undamaged_session_is_read(layer: Layer, session_id: str) -> None:
    """Control of all of the above: it is the damage that they find."""
    assert isinstance(await layer.sessions.read(session_id, OPERATOR, 10), Hot)
    assert isinstance(await begin(layer, session_id), Begun)
    assert await layer.commit(await begin(layer, session_id), new_turn(await begin(layer, session_id), "new turn"))
