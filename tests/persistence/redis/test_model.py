"""The Redis layer against a plain model of it: whatever happens in whatever order, no turn is lost, doubled or moved.

The same machine runs on fakeredis, many times, and on a real Redis. "Postgres" is a dict that gets what is flushed.
"""

import asyncio
from collections.abc import Awaitable
from typing import Any, TypeVar

import fakeredis
import msgspec
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from gateway.dev.servers.redis import RedisServer
from persistence.model.agents import TurnPolicy
from persistence.model.codec import decode_record
from persistence.model.session import Record, Session, Snapshot, Turn
from persistence.model.times import iso
from persistence.redis.connection import Client, connect
from persistence.redis.keys import Keys
from persistence.redis.outbox import DeadLetter
from persistence.redis.outcomes import Absent, Begun, Busy, Committed, Opened, Refused, Replay
from persistence.redis.scripts import Scripts
from persistence.redis.turn_logs import TurnLogs
from tests.support.layer import ACCESS, Layer, messages_of, new_id, new_session, new_turn
from tests.support.rule import miscounts

Outcome = TypeVar("Outcome")

HOT = 2
POLICY = TurnPolicy(hot_turns=HOT, hot_ttl_s=1800, if_busy="reject")
WHICH = st.sampled_from([0, 0, 0, 1])
MESSAGE_IDS = st.sampled_from(["", "m1", "m2", "m3"])


class Tables:
    """What Postgres has: the newest header of each session and its turns by number; and what must never come back."""

    def __init__(self) -> None:
        self.headers: dict[str, Session] = {}
        self.turns: dict[str, dict[int, Turn]] = {}
        self.erased: set[str] = set()

    def flush(self, records: list[Record]) -> None:
        """As the statements do it: newer revisions win, messages are inserted once, erased ids stay out."""
        for record in records:
            session = record.session
            if session.status == "erased":
                self.erased.add(session.id)
                self.headers.pop(session.id, None)
                self.turns.pop(session.id, None)
        for record in records:
            session = record.session
            if session.id in self.erased:
                continue
            known = self.headers.get(session.id)
            if known is None or known.revision < session.revision:
                self.headers[session.id] = session
            if record.turn:
                self.turns.setdefault(session.id, {}).setdefault(int(record.fact.removeprefix("t:")), record.turn)

    def snapshot(self, session_id: str) -> Snapshot | None:
        """What hydration reads."""
        for header in self.headers.values():
            if header.session_id == session_id:
                turns = self.turns.get(header.id, {})
                first = max(1, header.turns - HOT + 1)
                stored = msgspec.structs.replace(header, message_count=2 * len(turns))
                return Snapshot(stored, first, [turns[number] for number in range(first, header.turns + 1)])
        return None


class Expected:
    """What is true of one session id, as a visitor would tell it."""

    def __init__(self, session_id: str) -> None:
        self.session_id = session_id
        self.id = ""
        self.status = "none"
        self.turns: list[Turn] = []
        self.holder: tuple[Begun, str] | None = None
        self.lost: list[tuple[Begun, Turn]] = []
        self.tickets: list[tuple[Snapshot, int]] = []


class Machine(RuleBasedStateMachine):
    """One Redis, two session ids, one worker."""

    url = ""

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.layer = self.run(self.start())
        self.logs = TurnLogs(self.layer.scripts, self.layer.keys)
        self.tables = Tables()
        self.expected = [Expected(new_id()), Expected(new_id())]
        self.taken: list[Record] = []
        self.fence = 0
        self.turn_number = 0

    async def start(self) -> Layer:
        client = self.connect()
        await client.flushall()
        return Layer(client, Keys("gw", 1), self.scripts(client))

    def connect(self) -> Client:
        return connect(self.url)

    def scripts(self, client: Client) -> Scripts:
        return Scripts(client)

    async def entries(self) -> list[tuple[bytes, dict[bytes, bytes]]]:
        """The outbox."""
        found: Any = await self.layer.client.xrange(self.layer.keys.outbox(0))
        return list(found)

    def run(self, work: Awaitable[Outcome]) -> Outcome:
        async def wrapped() -> Outcome:
            return await work

        return self.runner.run(wrapped())

    def teardown(self) -> None:
        self.run(self.layer.client.aclose())
        self.runner.close()

    # ------------------------------------------------------------------------------------------------------ visitors

    @initialize()
    def begin_with_an_open_session(self) -> None:
        self.run(self._open(self.expected[0]))

    async def _present(self, one: Expected) -> bool:
        """Brings the session into Redis, as the hydrator does; whether there is one."""
        outcome = await self.layer.sessions.read(one.session_id, ACCESS)
        if not isinstance(outcome, Absent):
            return True
        snapshot = self.tables.snapshot(one.session_id)
        if snapshot is None:
            return False
        assert await self.layer.sessions.hydrate(snapshot, outcome.ticket, POLICY.hot_ttl_s)
        return True

    async def _open(self, one: Expected) -> None:
        new = new_session(one.session_id)
        if await self._present(one):
            outcome = await self.layer.sessions.open(new)
            if one.status == "erased":
                assert outcome == Refused("erased")
            else:
                assert isinstance(outcome, Opened)
                assert not outcome.created
                assert outcome.session.id == one.id
            return
        assert one.status in ("none", "erased"), "the session is neither in Redis nor in Postgres"
        absent = await self.layer.sessions.open(new)
        assert isinstance(absent, Absent)
        opened = await self.layer.sessions.open(new, ticket=absent.ticket)
        assert isinstance(opened, Opened)
        assert opened.created
        one.id, one.status, one.turns, one.holder = new.id, "active", [], None

    @rule(which=WHICH)
    def open(self, which: int) -> None:
        self.run(self._open(self.expected[which]))

    @rule(which=WHICH, message_id=MESSAGE_IDS)
    def begin(self, which: int, message_id: str) -> None:
        self.run(self._begin(self.expected[which], message_id))

    async def _begin(self, one: Expected, message_id: str) -> None:
        if not await self._present(one):
            assert one.status in ("none", "erased")
            return
        self.turn_number += 1
        turn_id = f"turn-{self.turn_number}"
        if one.status == "erased":
            outcome = await self.layer.sessions.begin(one.session_id, turn_id, ACCESS, POLICY, message_id=message_id)
            assert outcome == Refused("erased")
            return
        first_hot = (await self.layer.read(one.session_id)).first_hot
        outcome = await self.layer.sessions.begin(one.session_id, turn_id, ACCESS, POLICY, message_id=message_id)
        answered = [turn for turn in one.turns[first_hot - 1 :] if message_id and turn.message_id == message_id]
        if answered:
            assert isinstance(outcome, Replay)
            assert outcome.turn == answered[0]
            assert one.turns[outcome.number - 1] == answered[0]
        elif one.status == "ended":
            assert outcome == Refused("ended")
        elif one.holder:
            assert isinstance(outcome, Busy)
        else:
            assert isinstance(outcome, Begun)
            assert outcome.fence > self.fence
            self.fence = outcome.fence
            assert outcome.history == messages_of(one.turns[-HOT:])
            again = await self.layer.sessions.begin(one.session_id, turn_id, ACCESS, POLICY, message_id=message_id)
            assert isinstance(again, Begun)
            assert (again.fence, again.session, again.history) == (outcome.fence, outcome.session, outcome.history)
            one.holder = outcome, turn_id + "/" + message_id

    @rule(which=WHICH, twice=st.booleans())
    def commit(self, which: int, twice: bool) -> None:
        self.run(self._commit(self.expected[which], twice))

    async def _commit(self, one: Expected, twice: bool) -> None:
        if one.holder is None:
            return
        begun, name = one.holder
        turn_id, message_id = name.split("/")
        turn = new_turn(begun, turn_id, message_id, f"text of {turn_id}")
        for _ in range(1 + twice):
            committed = await self.layer.commit(begun, turn, POLICY)
            assert isinstance(committed, Committed)
            assert committed.message_count == 2 * (len(one.turns) + 1)
        one.turns.append(turn)
        one.holder, one.status = None, "active"

    @rule(which=WHICH, message_id=MESSAGE_IDS)
    def chat(self, which: int, message_id: str) -> None:
        """Begin and commit in one, so that sessions with some turns are common."""
        self.run(self._begin(self.expected[which], message_id))
        self.run(self._commit(self.expected[which], False))

    def _lose(self, one: Expected) -> None:
        if one.holder:
            begun, name = one.holder
            one.lost.append((begun, new_turn(begun, name.split("/")[0])))
            one.holder = None

    @rule(which=WHICH)
    def commit_too_late(self, which: int) -> None:
        """A paused owner wakes up: nothing changes, which the invariants see."""
        one = self.expected[which]
        for begun, turn in one.lost:
            assert self.run(self.layer.commit(begun, turn, POLICY)) is None

    @rule(which=WHICH)
    def abort(self, which: int) -> None:
        one = self.expected[which]
        if one.holder:
            assert self.run(self.layer.sessions.abort(one.session_id, one.holder[1].split("/")[0]))
            self._lose(one)
        assert not self.run(self.layer.sessions.abort(one.session_id, "turn-0"))

    @rule(which=WHICH)
    def reap(self, which: int) -> None:
        """The lease of a dead pod runs out."""
        one = self.expected[which]
        if one.holder:
            assert self.run(self.layer.sessions.reap(one.session_id)) is None
            self.run(self.layer.set(one.session_id, turn_lease_until=iso(0)))
            assert self.run(self.layer.sessions.reap(one.session_id)) == one.holder[1].split("/")[0]
            self._lose(one)
        assert self.run(self.layer.sessions.reap(one.session_id)) is None

    @rule(which=WHICH)
    def cancel(self, which: int) -> None:
        """A visitor takes the message back; cancelling what does not run is harmless."""
        one = self.expected[which]
        if one.holder:
            turn_id = one.holder[1].split("/")[0]
            assert self.run(self.logs.cancel(one.session_id, turn_id, ACCESS)) is True
            self._lose(one)
        assert self.run(self.logs.cancel(one.session_id, "turn-0", ACCESS)) in (False, Refused("erased"))

    @rule(which=WHICH)
    def time_out(self, which: int) -> None:
        self.run(self._time_out(self.expected[which]))

    async def _time_out(self, one: Expected) -> None:
        if not await self._present(one):
            return
        due = one.status == "active" and one.holder is None
        assert await self.layer.sessions.time_out(one.session_id, 0) is due
        if due:
            one.status = "timeout"

    @rule(which=WHICH)
    def end(self, which: int) -> None:
        self.run(self._end(self.expected[which]))

    async def _end(self, one: Expected) -> None:
        if not await self._present(one):
            return
        outcome = await self.layer.sessions.end(one.session_id, ACCESS)
        if one.status == "erased":
            assert outcome == Refused("erased")
            return
        assert isinstance(outcome, Session)
        assert outcome.status == "ended"
        self._lose(one)
        one.status = "ended"

    @rule(which=WHICH)
    def erase(self, which: int) -> None:
        self.run(self._erase(self.expected[which]))

    async def _erase(self, one: Expected) -> None:
        if not await self._present(one):
            return
        assert await self.layer.sessions.erase(one.session_id, ACCESS) == one.id
        self._lose(one)
        one.status, one.turns = "erased", []

    # --------------------------------------------------------------------------------------------- worker and memory

    @rule()
    def take(self) -> None:
        known = {record.entry for record in self.taken}
        self.taken += [record for record in self.run(self.new_records()) if record.entry not in known]

    async def new_records(self) -> list[Record]:
        return await self.layer.take()

    @rule(data=st.data(), marked=st.booleans())
    def flush(self, data: st.DataObject, marked: bool) -> None:
        """Any of the records taken, in any order, perhaps once more later: without `marked` the worker dies in between."""
        if not self.taken:
            return
        picked = data.draw(st.lists(st.sampled_from(range(len(self.taken))), unique=True, min_size=1))
        records = [self.taken[index] for index in picked]
        self.tables.flush(records)
        if marked:
            self.run(self.layer.outbox.mark_flushed(0, records, 1))
            self.taken = [record for record in self.taken if record not in records]

    @rule(data=st.data(), again=st.booleans())
    def dead_letter(self, data: st.DataObject, again: bool) -> None:
        """Postgres refuses a record that was taken; whoever holds it says so, perhaps twice."""
        refused = [record for record in self.taken if record.session.status != "erased"]
        if not refused:
            return
        record = data.draw(st.sampled_from(refused))
        for _ in range(1 + again):
            where = (0, record.entry, record.session.session_id, record.fact, "refused")
            self.run(self.layer.outbox.dead_letter(*where))
        self.taken.remove(record)

    @rule()
    def retry_dead(self) -> None:
        """The cause was removed: all dead letters are put back."""
        for letter in self.run(self.dead_letters()):
            assert self.run(self.layer.outbox.retry_dead(letter))
            assert not self.run(self.layer.outbox.retry_dead(letter))

    async def dead_letters(self) -> list[DeadLetter]:
        return await self.layer.outbox.dead_letters()

    @rule()
    def flush_all(self) -> None:
        self.take()
        while self.taken:
            self.tables.flush(self.taken)
            self.run(self.layer.outbox.mark_flushed(0, self.taken, 1))
            self.taken = []
            self.take()

    @rule(which=WHICH)
    def expire(self, which: int) -> None:
        """The idle time is over."""
        key = self.layer.keys.session(self.expected[which].session_id)
        if self.run(self.layer.client.execute_command("PTTL", key)) > 0:
            self.run(self.layer.client.execute_command("PEXPIREAT", key, 1))
            assert not self.run(self.layer.client.execute_command("EXISTS", key))

    @rule(which=WHICH)
    def evict(self, which: int) -> None:
        """What volatile-lru may do at any moment."""
        key = self.layer.keys.session(self.expected[which].session_id)
        if self.run(self.layer.client.execute_command("PTTL", key)) > 0:
            self.run(self.layer.client.execute_command("DEL", key))

    @rule(which=WHICH)
    def stall_before_hydration(self, which: int) -> None:
        """The session has left Redis; a pod gets a ticket, reads Postgres, and is paused."""
        one = self.expected[which]
        self.flush_all()
        self.evict(which)
        outcome = self.run(self.layer.sessions.read(one.session_id, ACCESS))
        snapshot = self.tables.snapshot(one.session_id)
        if isinstance(outcome, Absent) and snapshot:
            one.tickets.append((snapshot, outcome.ticket))

    @rule(which=WHICH)
    def hydrate_late(self, which: int) -> None:
        """It goes on, when the session has left again. Whether it may install what it read, the invariants say."""
        self.flush_all()
        self.evict(which)
        for snapshot, ticket in self.expected[which].tickets:
            self.run(self.layer.sessions.hydrate(snapshot, ticket, POLICY.hot_ttl_s))

    # ------------------------------------------------------------------------------------------------ what always holds

    @invariant()
    def no_turn_is_lost_doubled_or_moved(self) -> None:
        for one in self.expected:
            self.run(self._check(one))
        assert (
            not {turn.id for turns in self.tables.turns.values() for turn in turns.values()}
            - {turn.id for one in self.expected for turn in one.turns}
            - self._on_their_way()
        )

    @invariant()
    def the_counter_is_the_sum_of_what_waits(self) -> None:
        assert self.run(miscounts(self.layer.client, self.layer.keys)) == []

    def _on_their_way(self) -> set[str]:
        """Turns that Postgres may still have until the erasure of their session is flushed."""
        current = {one.id for one in self.expected if one.status != "erased"}
        return {turn.id for id_, turns in self.tables.turns.items() if id_ not in current for turn in turns.values()}

    async def _check(self, one: Expected) -> None:
        stored = self.tables.turns.get(one.id, {})
        fields = await self.layer.fields(one.session_id)
        mine = [entry for entry in await self.entries() if entry[1][b"session_id"].decode() == one.session_id]
        dead = await self.dead_entries(one.session_id)
        waiting = {entry.decode() for entry, _ in mine} | dead
        if not fields:
            assert not waiting, "records of a session that is not in Redis"
            assert one.holder is None, "a turn runs on a session that is not in Redis"
            if one.status == "erased":
                assert one.id in self.tables.erased
                assert not stored
            assert [stored.get(number) for number in range(1, len(one.turns) + 1)] == list(one.turns)
            return
        assert fields["id"] == one.id
        assert fields["status"] == one.status
        tokens = fields["unflushed"].split()
        assert {token.split("@")[1] for token in tokens} == waiting, "what is unflushed is on the outbox, or dead"
        assert len(fields.get("dead", "").split()) == len(dead)
        self._check_outbox(one, mine, tokens)
        assert len(tokens) == len(waiting)
        settled = not waiting and not fields["turn"]
        assert await self.layer.has_ttl(one.session_id) == settled, "the one rule"
        assert bool(fields["turn"]) == (one.holder is not None)
        if one.status == "erased":
            assert not any(name.startswith("t:") for name in fields)
            return
        turns, first_hot, flushed = (int(fields[name]) for name in ("turns", "first_hot", "flushed"))
        hot = (await self.layer.read(one.session_id)).turns
        assert turns == len(one.turns)
        assert first_hot <= flushed + 1
        assert hot == one.turns[first_hot - 1 :]
        assert len([name for name in fields if name.startswith("t:")]) == len(hot)
        assert [stored.get(number) for number in range(1, flushed + 1)] == one.turns[:flushed]
        assert [turn.seq for turn in hot] == [2 * number - 1 for number in range(first_hot, turns + 1)]
        assert int(fields["message_count"]) == 2 * turns

    def _check_outbox(self, one: Expected, entries: list[tuple[bytes, dict[bytes, bytes]]], tokens: list[str]) -> None:
        """What is on its way is what the model says: each fact and revision once, each turn as it was said."""
        records = [decode_record(entry, [part for pair in fields.items() for part in pair]) for entry, fields in entries]
        assert {f"{record.fact}@{record.entry}" for record in records} <= set(tokens)
        assert len({record.fact for record in records}) == len(records)
        assert len({record.session.revision for record in records}) == len(records)
        for record in records:
            assert record.session.id == one.id
            if record.turn:
                assert one.status != "erased"
                assert record.turn == one.turns[int(record.fact.removeprefix("t:")) - 1]

    async def dead_entries(self, session_id: str) -> set[str]:
        """The ids that the dead letters of a session had on the outbox."""
        found: Any = await self.layer.client.xrange(self.layer.keys.dead(0))
        return {fields[b"entry"].decode() for _, fields in found if fields[b"session_id"].decode() == session_id}


class FakeScripts(Scripts):
    """The scripts without the line that fakeredis does not know."""

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        for name, text in self.texts.items():
            self.use(name, text.split("\n", 1)[1])


class FakeMachine(Machine):
    """On fakeredis, whose errors a script cannot read, as `take` does: all that is on the outbox is taken."""

    def connect(self) -> Client:
        client: Client = fakeredis.FakeAsyncRedis(version=(7,))
        return client

    def scripts(self, client: Client) -> Scripts:
        return FakeScripts(client)

    async def new_records(self) -> list[Record]:
        return [
            decode_record(entry, [part for pair in record.items() for part in pair])
            for entry, record in await self.entries()
        ]


SETTINGS = settings(
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


def test_the_layer_does_what_the_model_does_many_times_over() -> None:
    run_state_machine_as_test(FakeMachine, settings=settings(SETTINGS, max_examples=150, stateful_step_count=25))


def test_the_layer_does_what_the_model_does_on_a_real_redis(redis_server: RedisServer) -> None:
    class RealMachine(Machine):
        url = redis_server.url

    run_state_machine_as_test(RealMachine, settings=settings(SETTINGS, max_examples=40, stateful_step_count=25))


class Edited(FakeScripts):
    """Scripts with `old` replaced by `new` wherever it stands."""

    old: str
    new: str

    def __init__(self, client: Client) -> None:
        super().__init__(client)
        edited = {name: text.replace(self.old, self.new) for name, text in self.texts.items() if self.old in text}
        if not edited:
            raise LookupError(f"no script has {self.old!r}")  # no AssertionError: that would count as found
        for name, text in edited.items():
            self.use(name, text)


class Forgetful(Edited):
    """Control: a commit that lets turns go before Postgres has them."""

    old, new = "first_hot <= flushed and ", ""


class Impatient(Edited):
    """Control: sets a TTL while records are on their way."""

    old, new = "if unflushed ~= '' or turn ~= '' then", "if false then"


class Trusting(Edited):
    """Control: installs what was read from Postgres, whatever became of its ticket."""

    old, new = "if redis.call('GET', ticket_key) ~= args.ticket then return reply('stale') end", ""


class Miscounting(Edited):
    """Control: takes records off the outbox and their bytes not off its counter."""

    old, new = "outbox_bytes(bytes_key) - bytes", "outbox_bytes(bytes_key)"


class Unfenced(Edited):
    """Control: commits for whoever asks."""

    old, new = "if turn_id ~= args.turn_id or fence ~= args.fence then", "if false then"


class Silent(Edited):
    """Control: changes the session and puts nothing on the outbox."""

    old, new = "redis.call('XADD', outbox_key, '*', unpack(record))", "'1-1'"


class Doubling(Edited):
    """Control: a commit that is repeated is committed again."""

    old = Unfenced.old
    new = (
        "if cjson.decode(redis.call('HGET', session_key, 't:' .. args.number) or '{}').id ~= args.turn_id"
        " and turn_id ~= args.turn_id then"
    )


def finds_fault(kind: type[Scripts]) -> bool:
    """Whether the machine notices that these scripts are broken."""

    class Broken(FakeMachine):
        def scripts(self, client: Client) -> Scripts:
            return kind(client)

    phases = [Phase.generate]  # it is enough to find one: none is made small
    try:
        run_state_machine_as_test(
            Broken, settings=settings(SETTINGS, max_examples=300, stateful_step_count=25, phases=phases)
        )
    except AssertionError:
        return True
    return False


@pytest.mark.parametrize("kind", [Forgetful, Impatient, Trusting, Miscounting, Unfenced, Silent, Doubling])
def test_the_model_notices_scripts_that_are_broken(kind: type[Scripts]) -> None:
    """Control: each guard taken out of the scripts, one at a time."""
    assert finds_fault(kind)
