"""The records of a master that another has taken over from, while it still answers.

A master is told late that it is one no more, and goes on meanwhile: a planned failover of Sentinel leaves it writable for
some ten seconds. What it answered that its successor does not have is on its outbox, and from there goes to Postgres, before
anybody uses the successor. The successor's new epoch makes every session look there first.
"""

import asyncio
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any

import structlog
from redis.asyncio import Redis
from redis.exceptions import RedisError

from persistence.errors import PersistenceError, RedisUnavailable
from persistence.flusher import Flusher
from persistence.model.session import Record
from persistence.postgres.postgres import Postgres
from persistence.redis.keys import Keys
from persistence.redis.outbox import Outbox, Taken
from persistence.redis.scripts import Scripts
from persistence.redis.sessions import SessionStore

log = structlog.get_logger()

LIMIT_S = 1.0
"""How long the successor waits for the records of its predecessor."""
LAST_S = 0.4
"""How long it may take until everybody knows of the successor."""
LOOK_AGAIN_S = 0.05
BATCH = 2000

Address = tuple[str, int]
ConnectTo = Callable[[Address], Redis]


class _LeftOutbox(Outbox):
    """The outbox of a master that may take no writes any more: nothing depends on them."""

    async def mark_flushed(self, partition: int, records: Sequence[Record], epoch: int) -> int:
        try:
            return await super().mark_flushed(partition, records, epoch)
        except RedisUnavailable:
            return 0

    async def count(self, partition: int, what: str, number: int) -> None:
        """Counts nothing: these counters are lost with their master."""


class _LeftSessions(SessionStore):
    """The sessions of such a master, which nobody uses any more."""

    async def doubt(self, session_id: str) -> None:
        """Does nothing: the successor's sessions are looked at anyway."""

    async def erase_again(self, session_id: str, session_uuid: str) -> bool:
        return False


class Rescue:
    """Brings the records of predecessors into Postgres; `name` is the worker's."""

    def __init__(self, connect_to: ConnectTo, keys: Keys, postgres: Postgres, name: str) -> None:
        self._connect_to = connect_to
        self._keys = keys
        self._postgres = postgres
        self._name = name

    async def leave(self, address: Address) -> None:
        """Flushes all that is on the outboxes of a former master, also what comes within LAST_S; takes LIMIT_S at most."""
        client, flushed, began_at = self._connect_to(address), 0, monotonic()
        try:
            async with asyncio.timeout(LIMIT_S):
                scripts = Scripts(client)
                outbox = _LeftOutbox(scripts, self._keys, self._name)
                flusher = Flusher(outbox, self._postgres, _LeftSessions(scripts, self._keys))
                # As long as anybody may not know yet of the successor.
                while monotonic() - began_at < LAST_S:
                    for partition in range(self._keys.partitions):
                        flushed += await self._flush(client, flusher, partition)
                    await asyncio.sleep(LOOK_AGAIN_S)
        except (PersistenceError, RedisError, OSError) as error:
            log.info("master.left", error=type(error).__name__, records=flushed)
        else:
            log.warning("master.left", records=flushed)
        finally:
            await client.aclose()

    async def _flush(self, client: Redis, flusher: Flusher, partition: int) -> int:
        # Plain reads: a master without replicas may refuse every script. Nobody else uses these connections.
        epoch = int(await client.hget(self._keys.epoch(partition), "epoch") or 0)
        after, flushed = "-", 0
        while True:
            found: Any = await client.xrange(self._keys.outbox(partition), min=after, count=BATCH)
            entries = [(entry, [part for pair in fields.items() for part in pair]) for entry, fields in found]
            if not entries:
                return flushed
            await flusher.flush(partition, Taken(entries, [], epoch))
            after, flushed = f"({entries[-1][0].decode()}", flushed + len(entries)


class Wait:
    """Waits until a worker has brought the records of a predecessor into Postgres."""

    def __init__(self, connect_to: ConnectTo, keys: Keys) -> None:
        self._connect_to = connect_to
        self._keys = keys

    async def leave(self, address: Address) -> None:
        """Waits until the outboxes of a former master are empty, or it does not answer: from LAST_S to LIMIT_S."""
        client = self._connect_to(address)
        try:
            async with asyncio.timeout(LIMIT_S):
                await self._waiting(client)
                await asyncio.sleep(LAST_S)
                for _ in range(int(LIMIT_S / LOOK_AGAIN_S)):
                    if not await self._waiting(client):
                        break
                    await asyncio.sleep(LOOK_AGAIN_S)
        except (RedisError, OSError) as error:
            log.info("master.left", error=type(error).__name__)
        finally:
            await client.aclose()

    async def _waiting(self, client: Redis) -> bool:
        return any([await client.xlen(self._keys.outbox(partition)) for partition in range(self._keys.partitions)])
