"""The outbox: records that are not in Postgres yet, a stream a partition. An entry leaves it when flushed or dead-lettered.

The worker takes and acknowledges records; the gateway reads the backlog.
"""

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import NamedTuple

import msgspec

from persistence.model.codec import decode_record
from persistence.model.session import Record
from persistence.redis.keys import GROUP, Keys
from persistence.redis.partitions import Partitions
from persistence.redis.pool import Argument
from persistence.redis.scripts import Scripts

CLAIM_IDLE_MS = 10_000
"""A worker that has not touched its pending records for so long is taken for dead, and another one claims them."""


class Taken(msgspec.Struct):
    """Entries as (id, [field, value, ...]); `deleted` are ids of pending entries that no longer exist. `epoch` is the
    partition's, 0 without one: the entries can be acknowledged in this one alone."""

    entries: list[tuple[bytes, list[bytes]]]
    deleted: list[bytes]
    epoch: int


class Backlog(msgspec.Struct):
    """Records on the outbox, their bytes, the age of the oldest in `lag_ms`, and the number of dead letters; without those
    of the partitions that are `unreachable`."""

    records: int
    bytes: int
    lag_ms: int
    dead: int
    unreachable: int = 0


class Waiting(NamedTuple):
    """The sessions with records on the outbox, None when there are too many; how many partitions are not among it."""

    session_ids: set[str] | None
    unreachable: int


class DeadLetter(msgspec.Struct):
    """A record that Postgres refused."""

    partition: int
    entry: str
    session_id: str
    fact: str
    reason: str
    died_at: str


class Outbox:
    """The outboxes of all partitions, for one `consumer` of the group."""

    def __init__(self, scripts: Scripts, keys: Keys, consumer: str = "", partitions: Partitions | None = None) -> None:
        self._scripts = scripts
        self._keys = keys
        self._consumer = consumer
        self.partitions = partitions or Partitions(scripts, keys)

    async def take(self, partition: int, count: int, *, claim: bool = False, after: bytes = b"0") -> Taken:
        """Up to `count` records: this consumer's pending ones behind the entry `after`; if it has none, new ones, and with
        `claim` those of dead workers. Raises RedisUnavailable."""
        outbox = self._keys.outbox(partition)
        keys = [outbox, self._keys.epoch(partition)]
        arguments: dict[str, Argument] = {"group": GROUP, "consumer": self._consumer, "count": count, "after": after}
        claim_idle_ms = CLAIM_IDLE_MS if claim else 0
        where, deleted, epoch = await self._scripts.run("take", "", keys, {**arguments, "claim_idle_ms": claim_idle_ms})
        if where == "nothing":
            return Taken([], deleted, epoch)

        async def read(behind: bytes) -> list[tuple[bytes, list[bytes]]]:
            command = ("XREADGROUP", "GROUP", GROUP, self._consumer, "COUNT", count, "STREAMS", outbox, behind)
            # The script runs once more for its echo alone, which proves whose reply this is.
            streams = await self._scripts.read_and_run(command, "take", "", keys, {**arguments, "claim_idle_ms": 0})
            # A pending entry that was deleted comes without fields.
            return [(entry, _flat(fields)) for entry, fields in (streams[0][1] if streams else []) if fields]

        entries = await read(after) if where == "pending" else []
        return Taken(entries or await read(b">"), deleted, epoch)

    async def leave(self, partition: int, entries: Sequence[bytes]) -> None:
        """Leaves taken records pending for the next worker that claims; this one goes on behind them."""
        outbox, ids = self._keys.outbox(partition), b" ".join(entries)
        await self._scripts.run("leave", "", [outbox], {"group": GROUP, "entries": ids, "idle_ms": CLAIM_IDLE_MS})

    async def mark_flushed(self, partition: int, records: Sequence[Record], epoch: int) -> int:
        """Acknowledges records that are in Postgres and were taken in `epoch`; the number that this call removed from the
        outbox. In another epoch it removes none: they are taken again."""
        session_ids = list(dict.fromkeys(record.session.session_id for record in records))
        index = {session_id: i + 1 for i, session_id in enumerate(session_ids)}
        tokens = " ".join(
            f"{record.entry},{record.bytes},{record.fact},{index[record.session.session_id]}" for record in records
        )
        sessions = map(self._keys.session, session_ids)
        keys = [*self._outbox(partition), self._keys.live(partition), self._keys.epoch(partition), *sessions]
        reply = await self._scripts.run("mark_flushed", "", keys, {"group": GROUP, "epoch": epoch, "records": tokens}, 5)
        return int(reply[1]) if reply[0] == "marked" else 0

    async def records_of(self, partition: int, session_id: str) -> list[Record]:
        """The records about a session that its hash says are on the outbox, oldest first. Raises Damaged."""
        unflushed = await self._scripts.command("HGET", self._keys.session(session_id), "unflushed")
        outbox = self._keys.outbox(partition)
        records = []
        for token in (unflushed or b"").split():
            entry = token.rpartition(b"@")[2]
            for found, fields in await self._scripts.command("XRANGE", outbox, entry, entry):
                records.append(decode_record(found, fields, self._scripts.fields))
        return records

    async def count(self, partition: int, what: str, number: int) -> None:
        """Adds to a counter of the partition's epoch hash, for operators."""
        await self._scripts.command("HINCRBY", self._keys.epoch(partition), what, number)

    def _outbox(self, partition: int) -> tuple[str, str]:
        """The keys of an outbox and of its byte counter."""
        return self._keys.outbox(partition), self._keys.outbox_bytes(partition)

    def _session_key(self, partition: int, session_id: str) -> str:
        """The session's key; for a damaged or missing id, a key of the partition's slot that never exists."""
        if self._keys.partition(session_id) == partition:
            return self._keys.session(session_id)
        return self._keys.outbox(partition).removesuffix("outbox") + "session:"

    async def dead_letter(self, partition: int, entry: str, session_id: str, fact: str, reason: str) -> bool:
        """Moves a record to the dead letters with the reason; whether it was still on the outbox."""
        reply = await self._scripts.run(
            "dead_letter",
            session_id,
            [*self._outbox(partition), self._keys.dead(partition), self._session_key(partition, session_id)],
            {"group": GROUP, "entry": entry, "fact": fact, "reason": reason},
        )
        return bool(reply[0] == "moved")

    async def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """The oldest dead letters, up to `limit` of each partition that can be reached. Raises RedisUnavailable when none
        can."""
        return (await self.find_dead_letters(limit))[0]

    async def find_dead_letters(self, limit: int = 100) -> tuple[list[DeadLetter], int]:
        """As `dead_letters`, and the number of partitions that cannot be reached."""
        found, unreachable = await self.partitions.each(lambda partition: self._dead_letters(partition, limit))
        return list(chain.from_iterable(found)), len(unreachable)

    async def _dead_letters(self, partition: int, limit: int) -> list[DeadLetter]:
        found = []
        for entry, fields in await self._range(self._keys.dead(partition), limit):
            text = {name: value.decode(errors="replace") for name, value in _pairs(fields)}
            names = (b"session_id", b"fact", b"reason", b"died_at")
            found.append(DeadLetter(partition, entry.decode(), *(text.get(name, "") for name in names)))
        return found

    async def retry_dead(self, letter: DeadLetter) -> bool:
        """Puts a dead letter back on the outbox; whether it still existed."""
        partition, session_id = letter.partition, letter.session_id
        keys = [*self._outbox(partition), self._keys.dead(partition), self._session_key(partition, session_id)]
        reply = await self._scripts.run("retry_dead", session_id, keys, {"dead_entry": letter.entry})
        return bool(reply[0] == "queued")

    async def session_ids(self, limit: int) -> Waiting:
        """The sessions with records on the outbox, unless it has more than `limit` records. Raises RedisUnavailable when no
        partition can be reached."""
        lists, unreachable = await self.partitions.each(
            lambda partition: self._range(self._keys.outbox(partition), limit + 1)
        )
        if sum(map(len, lists)) > limit:
            return Waiting(None, len(unreachable))
        found: set[str] = set()
        for _, fields in chain.from_iterable(lists):
            found.update(value.decode() for name, value in _pairs(fields) if name == b"session_id")
        return Waiting(found, len(unreachable))

    async def backlog(self, now_ms: int) -> Backlog:
        """How far Postgres is behind, over all partitions that can be reached, at `now_ms` (Unix time). Raises
        RedisUnavailable when none can."""
        parts, unreachable = await self.partitions.each(lambda partition: self._backlog(partition, now_ms))
        return Backlog(
            sum(part.records for part in parts),
            sum(part.bytes for part in parts),
            max((part.lag_ms for part in parts), default=0),
            sum(part.dead for part in parts),
            len(unreachable),
        )

    async def _backlog(self, partition: int, now_ms: int) -> Backlog:
        outbox = self._keys.outbox(partition)
        records, counted = await self._length(outbox), await self._bytes(partition)
        dead, oldest = await self._length(self._keys.dead(partition)), await self._range(outbox, 1)
        lag_ms = now_ms - int(oldest[0][0].split(b"-")[0]) if oldest else 0
        return Backlog(records, counted, lag_ms, dead)

    async def _length(self, key: str) -> int:
        return int(await self._scripts.command("XLEN", key))

    async def _bytes(self, partition: int) -> int:
        counted = await self._scripts.command("GET", self._keys.outbox_bytes(partition))
        return int(counted) if counted and counted.isdigit() else 0

    async def _range(self, key: str, limit: int) -> list[tuple[bytes, list[bytes]]]:
        reply = await self._scripts.command("XRANGE", key, "-", "+", "COUNT", limit, timeout_s=5)
        return [(entry, fields) for entry, fields in reply]


def _flat(fields: list[bytes] | dict[bytes, bytes]) -> list[bytes]:
    # redis-py's client of a cluster returns a dict.
    return list(chain.from_iterable(fields.items())) if isinstance(fields, dict) else fields


def _pairs(fields: Sequence[bytes]) -> Iterable[tuple[bytes, bytes]]:
    return zip(fields[::2], fields[1::2], strict=True)
