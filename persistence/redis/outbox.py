"""The outbox: records that are not in Postgres yet. Entries leave it only when flushed or dead-lettered.

Called by the worker, and by the gateway to tell how far behind Postgres is.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import msgspec

from persistence.model.session import Record
from persistence.redis.connection import gather_bounded
from persistence.redis.keys import GROUP, Keys
from persistence.redis.pool import Argument
from persistence.redis.scripts import Scripts

CLAIM_IDLE_MS = 10_000


class Taken(msgspec.Struct):
    """Entries as (id, [field, value, ...]), and ids that another consumer was given but that no longer exist."""

    entries: list[tuple[bytes, list[bytes]]]
    deleted: list[bytes]


class Backlog(msgspec.Struct):
    """Records that wait for Postgres: how many, how many bytes of them, and for how long the oldest has waited."""

    records: int
    bytes: int
    lag_ms: int
    dead: int


class DeadLetter(msgspec.Struct):
    """A record that Postgres refused."""

    partition: int
    entry: str
    session_id: str
    fact: str
    reason: str
    died_at: str


class Outbox:
    """The outboxes of all partitions, as one consumer of the group sees them."""

    def __init__(self, scripts: Scripts, keys: Keys, consumer: str = "") -> None:
        self._scripts = scripts
        self._keys = keys
        self._consumer = consumer
        self.partitions = range(keys.partitions)

    async def take(self, partition: int, count: int, *, claim: bool = False, after: bytes = b"0") -> Taken:
        """Up to `count` records: this consumer's own pending ones behind the entry `after`; if none, new ones, with dead
        workers' if `claim`."""
        outbox = self._keys.outbox(partition)
        arguments: dict[str, Argument] = {"group": GROUP, "consumer": self._consumer, "count": count, "after": after}
        claim_idle_ms = CLAIM_IDLE_MS if claim else 0
        where, deleted = await self._scripts.run("take", "", [outbox], {**arguments, "claim_idle_ms": claim_idle_ms})
        if where == "nothing":
            return Taken([], deleted)

        async def read(behind: bytes) -> list[tuple[bytes, list[bytes]]]:
            command = ("XREADGROUP", "GROUP", GROUP, self._consumer, "COUNT", count, "STREAMS", outbox, behind)
            # The script once more, for its echo: what it says then is of no interest.
            streams = await self._scripts.read_and_run(command, "take", "", [outbox], {**arguments, "claim_idle_ms": 0})
            # What is pending and was deleted comes without fields.
            return [(entry, _flat(fields)) for entry, fields in (streams[0][1] if streams else []) if fields]

        entries = await read(after) if where == "pending" else []
        return Taken(entries or await read(b">"), deleted)

    async def leave(self, partition: int, entries: Sequence[bytes]) -> None:
        """Leaves records that were taken to whichever worker claims next; this one goes on with what is behind them."""
        outbox, ids = self._keys.outbox(partition), b" ".join(entries)
        await self._scripts.run("leave", "", [outbox], {"group": GROUP, "entries": ids, "idle_ms": CLAIM_IDLE_MS})

    async def mark_flushed(self, partition: int, records: Sequence[Record]) -> int:
        """Notes that the records are in Postgres; how many were taken off the outbox by this call."""
        session_ids = list(dict.fromkeys(record.session.session_id for record in records))
        index = {session_id: i + 1 for i, session_id in enumerate(session_ids)}
        tokens = " ".join(
            f"{record.entry},{record.bytes},{record.fact},{index[record.session.session_id]}" for record in records
        )
        keys = [*self._outbox(partition), self._keys.live(partition), *map(self._keys.session, session_ids)]
        reply = await self._scripts.run("mark_flushed", "", keys, {"group": GROUP, "records": tokens}, 5)
        return int(reply[1])

    def _outbox(self, partition: int) -> tuple[str, str]:
        """An outbox and the counter of its bytes."""
        return self._keys.outbox(partition), self._keys.outbox_bytes(partition)

    def _session_key(self, partition: int, session_id: str) -> str:
        """The session's key; for an id that is damaged, or missing, one in the partition's own slot that never exists."""
        if self._keys.partition(session_id) == partition:
            return self._keys.session(session_id)
        return self._keys.outbox(partition).removesuffix("outbox") + "session:"

    async def dead_letter(self, partition: int, entry: str, session_id: str, fact: str, reason: str) -> bool:
        """Moves a record aside, with the reason."""
        reply = await self._scripts.run(
            "dead_letter",
            session_id,
            [*self._outbox(partition), self._keys.dead(partition), self._session_key(partition, session_id)],
            {"group": GROUP, "entry": entry, "fact": fact, "reason": reason},
        )
        return bool(reply[0] == "moved")

    async def dead_letters(self, limit: int = 100) -> list[DeadLetter]:
        """The oldest dead letters of each partition."""
        found = []
        for partition in self.partitions:
            for entry, fields in await self._range(self._keys.dead(partition), limit):
                text = {name: value.decode(errors="replace") for name, value in _pairs(fields)}
                found.append(
                    DeadLetter(
                        partition,
                        entry.decode(),
                        text.get(b"session_id", ""),
                        text.get(b"fact", ""),
                        text.get(b"reason", ""),
                        text.get(b"died_at", ""),
                    )
                )
        return found

    async def retry_dead(self, letter: DeadLetter) -> bool:
        """Puts a dead letter back on the outbox; whether it was there."""
        partition, session_id = letter.partition, letter.session_id
        keys = [*self._outbox(partition), self._keys.dead(partition), self._session_key(partition, session_id)]
        reply = await self._scripts.run("retry_dead", session_id, keys, {"dead_entry": letter.entry})
        return bool(reply[0] == "queued")

    async def session_ids(self, limit: int) -> set[str] | None:
        """The sessions that have records waiting; None when there are more than `limit` records."""
        found: set[str] = set()
        outboxes = [self._keys.outbox(partition) for partition in self.partitions]
        lists = await gather_bounded(self._range(outbox, limit + 1) for outbox in outboxes)
        if sum(map(len, lists)) > limit:
            return None
        for _, fields in chain.from_iterable(lists):
            found.update(value.decode() for name, value in _pairs(fields) if name == b"session_id")
        return found

    async def backlog(self, now_ms: int) -> Backlog:
        """How far Postgres is behind, over all partitions."""
        outboxes = [self._keys.outbox(partition) for partition in self.partitions]
        records = await gather_bounded(self._length(outbox) for outbox in outboxes)
        counted = await gather_bounded(self._bytes(partition) for partition in self.partitions)
        dead = await gather_bounded(self._length(self._keys.dead(partition)) for partition in self.partitions)
        oldest = await gather_bounded(self._range(outbox, 1) for outbox in outboxes)
        lags = [now_ms - int(entry.split(b"-")[0]) for entry, _ in chain.from_iterable(oldest)]
        return Backlog(sum(records), sum(counted), max(lags, default=0), sum(dead))

    async def _length(self, key: str) -> int:
        return int(await self._scripts.command("XLEN", key))

    async def _bytes(self, partition: int) -> int:
        counted = await self._scripts.command("GET", self._keys.outbox_bytes(partition))
        return int(counted) if counted and counted.isdigit() else 0

    async def _range(self, key: str, limit: int) -> list[tuple[bytes, list[bytes]]]:
        reply = await self._scripts.command("XRANGE", key, "-", "+", "COUNT", limit, timeout_s=5)
        return [(entry, fields) for entry, fields in reply]


def _flat(fields: list[bytes] | dict[bytes, bytes]) -> list[bytes]:
    # redis-py's client of a cluster makes a dict of them.
    return list(chain.from_iterable(fields.items())) if isinstance(fields, dict) else fields


def _pairs(fields: Sequence[bytes]) -> Iterable[tuple[bytes, bytes]]:
    return zip(fields[::2], fields[1::2], strict=True)
