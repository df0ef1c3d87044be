"""What may be lost with a master of Redis, by times and by what Postgres had: everything else never.

A fault that makes Redis forget opens a `Loss` before it harms, and closes it when the Redis that forgets can answer nobody
any more; what Postgres had by then, and the Redis that goes on in its place, is read at once. So an answer may be lost with
the master if, and only if, that master gave it (it came within the loss, to a request from before its end), and neither
Postgres nor the next master had it.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import inf
from typing import Any

import asyncpg
from redis.asyncio import Redis, RedisCluster

from persistence.redis.keys import Keys
from tests.support.rule import all_keys

DELIVERY_S = 1.0
"""How long an answer takes at most, on a busy machine, from Redis to the visitor who writes down when it came."""

HELD_SESSIONS = "SELECT id::text, session_id, status, coalesce(external_user_id, '') AS user_id FROM agent_sessions"
HELD_TURNS = (
    "SELECT session.session_id, array_agg(message.turn_id::text) AS turn_ids"
    " FROM agent_messages message JOIN agent_sessions session ON session.id = message.session_id GROUP BY 1"
)
HELD_ERASURES = "SELECT id::text FROM erased_sessions"


@dataclass(frozen=True)
class Moment:
    """One request that was answered, in seconds of the monotonic clock."""

    asked_at: float
    answered_at: float


@dataclass(frozen=True)
class Held:
    """What Postgres had at a moment. Sessions by their session id: their turns, and their users where they have one; those
    that had ended; those that had been erased, by the ids of their rows."""

    turns: Mapping[str, frozenset[str]]
    users: Mapping[str, str]
    ended: frozenset[str]
    erased: frozenset[str]

    def __or__(self, other: "Held") -> "Held":
        """What one or the other had."""
        turns = {
            session_id: self.turns.get(session_id, frozenset()) | other.turns.get(session_id, frozenset())
            for session_id in {*self.turns, *other.turns}
        }
        return Held(turns, {**self.users, **other.users}, self.ended | other.ended, self.erased | other.erased)


async def read_held(url: str) -> Held:
    """Reads it, in one snapshot."""
    connection = await asyncpg.connect(url)
    try:
        async with connection.transaction(isolation="repeatable_read", readonly=True):
            sessions = await connection.fetch(HELD_SESSIONS)
            turns = await connection.fetch(HELD_TURNS)
            erased = await connection.fetch(HELD_ERASURES)
    finally:
        await connection.close()
    return Held(
        {row["session_id"]: frozenset() for row in sessions}
        | {row["session_id"]: frozenset(row["turn_ids"]) for row in turns},
        {row["session_id"]: row["user_id"] for row in sessions if row["user_id"]},
        frozenset(row["session_id"] for row in sessions if row["status"] == "ended"),
        frozenset(row["id"] for row in erased),
    )


async def read_hot(client: Redis | RedisCluster, keys: Keys) -> Held:
    """The same of a Redis that goes on: nothing of it is lost with another one."""
    turns, users, ended, erased = {}, {}, set(), set()
    for key in [key for key in await all_keys(client, keys) if ":session:" in key]:
        fields: Any = await client.hgetall(key)
        if not fields:
            continue
        session_id = key.partition(":session:")[2]
        turns[session_id] = frozenset(json.loads(turn)["id"] for name, turn in fields.items() if name.startswith(b"t:"))
        if user := fields.get(b"user_id", b"").decode():
            users[session_id] = user
        status = fields.get(b"status")
        if status == b"ended":
            ended.add(session_id)
        elif status == b"erased":
            erased.add(fields[b"id"].decode())
    return Held(turns, users, frozenset(ended), frozenset(erased))


@dataclass
class Loss:
    """A time of which a Redis may have forgotten everything: `since` then nothing more was safe, `until` then it could
    answer. `covers` tells whether a session was on it."""

    fault: str
    since: float
    covers: Callable[[str], bool]
    until: float = inf
    held: Held | None = None

    def may_lack(self, session_id: str, moment: Moment) -> bool:
        """Whether the answer may have been one that only this Redis knew of, as far as times tell."""
        given_by_it = moment.asked_at < self.until and self.since < moment.answered_at < self.until + DELIVERY_S
        return given_by_it and self.covers(session_id)


@dataclass
class Losses:
    """All losses of a run. Answers that come while one is open are looked at when it is closed: `later` holds the looks."""

    all: list[Loss] = field(default_factory=list)
    later: list[Callable[[], None]] = field(default_factory=list)

    def open(self, fault: str, since: float, covers: Callable[[str], bool] = lambda session_id: True) -> Loss:
        loss = Loss(fault, since, covers)
        self.all.append(loss)
        return loss

    def close(self, loss: Loss, until: float, held: Held) -> None:
        """The Redis that forgets can answer nobody since `until`; Postgres had `held` by then."""
        loss.until, loss.held = until, held
        if not self.is_open:
            looks, self.later = self.later, []
            for look in looks:
                look()

    @property
    def is_open(self) -> bool:
        return any(loss.held is None for loss in self.all)

    def look(self, look: Callable[[], None]) -> None:
        """Has something looked at as soon as it is known what may be lost."""
        if self.is_open:
            self.later.append(look)
        else:
            look()

    def turn(self, session_id: str, turn_id: str, moment: Moment) -> Loss | None:
        """The loss with which an answered turn may be gone; None when it may not."""
        return self._find(session_id, moment, lambda held: turn_id in held.turns.get(session_id, ()))

    def end(self, session_id: str, moment: Moment) -> Loss | None:
        """The same, of the end of a session."""
        return self._find(session_id, moment, lambda held: session_id in held.ended)

    def erasure(self, session_id: str, row_id: str, moment: Moment) -> Loss | None:
        """The same, of an erasure. Without the row's id nobody can tell whether Postgres had it."""
        return self._find(session_id, moment, lambda held: row_id in held.erased)

    def user(self, session_id: str, moment: Moment) -> Loss | None:
        """The same, of the user that a session was bound to."""
        return self._find(session_id, moment, lambda held: session_id in held.users)

    def opening(self, session_id: str, moment: Moment) -> Loss | None:
        """The same, of a session that was opened."""
        return self._find(session_id, moment, lambda held: session_id in held.turns)

    def _find(self, session_id: str, moment: Moment, held_it: Callable[[Held], bool]) -> Loss | None:
        if any(held_it(loss.held) for loss in self.all if loss.held is not None):
            return None
        return next((loss for loss in self.all if loss.may_lack(session_id, moment)), None)
