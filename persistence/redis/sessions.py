"""The Redis layer: the operations on a session, one atomic script each. Redis owns the truth about a live session.

Called by the gateway (begin, commit, abort, renew, open, read, end, erase) and by the worker (hydrate, time_out, reap).
It never reads Postgres: a session that is not in Redis is `Absent` with a ticket, and the hydrator installs what Postgres
has of it under that ticket."""

from itertools import chain
from math import ceil
from typing import Any

import msgspec

from persistence.errors import Damaged
from persistence.model.agents import TurnPolicy
from persistence.model.codec import (
    decode_hash,
    decode_session,
    decode_turn,
    decode_turns,
    encode_session,
    encode_turn,
)
from persistence.model.ids import masked
from persistence.model.kinds import encode_object
from persistence.model.session import Access, NewSession, Session, Snapshot, Turn
from persistence.model.times import ms_of
from persistence.redis.epochs import Fences
from persistence.redis.keys import GROUP, Keys
from persistence.redis.log_entries import Part, log_arguments
from persistence.redis.outcomes import Absent, Begun, Busy, Committed, Hot, Opened, Queued, Reconciled, Refused, Replay
from persistence.redis.pool import Argument
from persistence.redis.scripts import Scripts

TICKET_MS = 10_000

WAITER_MS = 2_000


class SessionStore:
    """Sessions in one Redis. `lease_ms` is how long a dead pod can block a session; with `max_backlog` records, or
    `max_backlog_bytes` of them, on the outboxes new turns are refused. Each partition has an even share, rounded up,
    because a script sees only its own."""

    def __init__(
        self,
        scripts: Scripts,
        keys: Keys,
        *,
        lease_ms: int = 15_000,
        max_backlog: int = 200_000,
        max_backlog_bytes: int = 2**30,
        fences: Fences | None = None,
    ) -> None:
        self._fences = fences or Fences()
        self._scripts = scripts
        self._fields = scripts.fields
        self._keys = keys
        self.lease_ms = lease_ms
        self._room = {
            "max_backlog": ceil(max_backlog / keys.partitions),
            "max_backlog_bytes": ceil(max_backlog_bytes / keys.partitions),
        }

    def _key(self, session_id: str, *names: str) -> list[str]:
        """The session's key, then keys of its partition by name; `ticket` is the session's own."""
        head = self._keys.head(session_id)
        return [
            f"{head}session:{session_id}",
            *(f"{head}ticket:{session_id}" if name == "ticket" else head + name for name in names),
        ]

    async def begin(
        self,
        session_id: str,
        turn_id: str,
        access: Access,
        policy: TurnPolicy,
        *,
        message_id: str = "",
        digest: str = "",
    ) -> Begun | Absent | Replay | Busy | Queued | Refused:
        """Takes the session for a turn. Repeating the call with the same `turn_id` is safe.

        `digest` is a digest of the message, by which a reused `message_id` is noticed while it is being answered. Raises
        Damaged.
        """
        reply, fields = await self._scripts.run_and_read(
            "begin",
            session_id,
            self._key(session_id, "outbox", "outbox_bytes", "fence", "running", "ticket", "epoch"),
            {
                "turn_id": turn_id,
                **access_arguments(access),
                "message_id": message_id,
                "digest": digest,
                "lease_ms": self.lease_ms,
                "hot_ttl_s": policy.hot_ttl_s,
                "if_busy": policy.if_busy,
                "max_waiting": policy.max_waiting,
                "waiter_ms": WAITER_MS,
                "rate_messages": policy.rate_messages,
                "rate_ms": policy.rate_per_s * 1000,
                "rate_shadow": int(policy.rate_shadow),
                **self._room,
                "ticket_ms": TICKET_MS,
                "channel": self._keys.channel(session_id),
            },
        )
        where = f"session {masked(session_id)}"
        match reply:
            case ["begun", fence, now_ms, rate_ahead_ms]:
                self._fences.note(self._keys.partition(session_id), int(fence))
                if fields.get(b"turn") != turn_id.encode():
                    # The turn was ended between the script and the read of the hash: the script knows how.
                    return await self.begin(session_id, turn_id, access, policy, message_id=message_id, digest=digest)
                try:
                    session, history = decode_hash(fields, policy.hot_turns, where, self._fields)
                except Damaged:
                    # No caller knows of the turn yet: the session is left as it was.
                    await self.abort(session_id, turn_id, int(fence))
                    raise
                return Begun(int(fence), int(now_ms), session, history, rate_ahead_ms)
            case ["absent", ticket, held]:
                return Absent(ticket, held.decode())
            case ["replay", number, header, turn]:
                await self._scripts.confirm(self._keys.session(session_id))
                return Replay(decode_session(header, where, self._fields), number, decode_turn(turn, where, f"t:{number}"))
            case ["busy", left_ms, same, running]:
                return Busy(int(left_ms), bool(same), running.decode())
            case ["queued", position]:
                return Queued(position)
            case ["limited", retry_after_ms]:
                return Refused("limited", int(retry_after_ms))
            case [reason]:
                return Refused(reason)
        raise Damaged(where, "reply", f"of begin is {reply[0]}")

    async def commit(
        self, begun: Begun, turn: Turn, policy: TurnPolicy, context: dict[str, Any] | None = None, part: Part | None = None
    ) -> Committed | None:
        """Appends the turn to the session of `begun` and puts its record on the outbox; None when the turn has lost the
        session.

        The turn gets the session's next numbers; its last message is the session's last activity. `context` None leaves the
        session's; `part` has the events that are missing in the turn's log. Committing the same turn again adds nothing.
        """
        before = begun.session
        session_id = before.session_id
        keys = [
            *self._key(session_id, "outbox", "outbox_bytes", "live", "running", "logs"),
            self._keys.events(session_id, turn.id),
        ]
        while True:
            turn.seq = before.message_count + 1
            after = msgspec.structs.replace(
                before,
                status="active",
                ended_at="",
                turns=before.turns + 1,
                message_count=before.message_count + len(turn.messages),
                last_activity_at=turn.messages[-1].created_at,
                context=before.context if context is None else context,
                revision=before.revision + 1,
            )
            reply = await self._scripts.run(
                "commit",
                session_id,
                keys,
                {
                    "turn_id": turn.id,
                    "fence": begun.fence,
                    "revision": before.revision,
                    "number": after.turns,
                    "turn": encode_turn(turn),
                    "message_count": after.message_count,
                    "last_activity_at": after.last_activity_at,
                    "last_activity_ms": ms_of(after.last_activity_at),
                    "context": "" if context is None else encode_object(context),
                    "described": encode_session(after),
                    "hot_turns": policy.hot_turns,
                    **log_arguments(self._keys, session_id, part),
                },
                durable=True,
            )
            match reply:
                case ["committed"]:
                    return Committed(after.message_count, after.last_activity_at)
                case ["changed", header]:
                    # While the turn ran the session was given to a user, or Redis learned from Postgres what it had
                    # forgotten of it: the turn is committed to what the session is now.
                    before = decode_session(header, f"session {masked(session_id)}", self._fields)
                case _:
                    return None

    async def abort(self, session_id: str, turn_id: str, fence: int = 0, part: Part | None = None) -> bool:
        """Gives up a running or waiting turn; whether there was one. `part` has the events that are missing in its log."""
        keys = [*self._key(session_id, "running", "logs"), self._keys.events(session_id, turn_id)]
        arguments = {"turn_id": turn_id, "fence": fence, **log_arguments(self._keys, session_id, part)}
        return bool((await self._scripts.run("abort", session_id, keys, arguments))[0] == "aborted")

    async def renew(self, session_id: str, turn_id: str, fence: int) -> bool:
        """Renews the lease of a running turn; False when it is lost."""
        keys = self._key(session_id, "running")
        reply = await self._scripts.run(
            "renew", session_id, keys, {"turn_id": turn_id, "fence": fence, "lease_ms": self.lease_ms}
        )
        return bool(reply[0] == "renewed")

    async def open(
        self, new: NewSession, *, ticket: int = 0, authorized: bool = False, trusted: bool = False
    ) -> Opened | Absent | Refused:
        """Creates the session, or finds it. An anonymous session is given to `new.user_id`."""
        reply = await self._scripts.run(
            "open",
            new.session_id,
            self._key(new.session_id, "outbox", "outbox_bytes", "fence", "live", "ticket", "epoch"),
            {
                "id": new.id,
                **access_arguments(Access(new.agent_id, new.website_domain, authorized, new.user_id, trusted)),
                "channel": new.channel,
                "ip_address": new.ip_address,
                "user_agent": new.user_agent,
                "metadata": encode_object(new.metadata),
                "minted": int(new.minted),
                "hot_ttl_s": new.hot_ttl_s,
                "ticket": ticket or "",
                "ticket_ms": TICKET_MS,
                **self._room,
            },
            durable=True,
        )
        match reply:
            case ["opened" | "found" as word, header]:
                return Opened(decode_session(header, f"session {masked(new.session_id)}", self._fields), word == "opened")
            case ["absent", given, held]:
                return Absent(given, held.decode())
            case _:
                return Refused(reply[0])

    async def read(
        self, session_id: str, access: Access, count: int = 0, *, any_epoch: bool = False
    ) -> Hot | Absent | Refused:
        """The session, with up to `count` of its newest hot turns. With `any_epoch` as Redis has it, whatever Postgres may
        know since: for lists."""
        arguments = {**access_arguments(access), "count": count, "ticket_ms": TICKET_MS, "any_epoch": int(any_epoch)}
        reply = await self._scripts.run("read", session_id, self._key(session_id, "fence", "ticket", "epoch"), arguments)
        match reply:
            case ["read", ttl_ms, first_hot, flushed, running, fence, first, header, turns]:
                where = f"session {masked(session_id)}"
                decoded = decode_turns(turns, first, where)
                return Hot(
                    decode_session(header, where, self._fields),
                    ttl_ms,
                    first_hot,
                    flushed,
                    running.decode(),
                    int(fence or 0),
                    first,
                    decoded,
                )
            case ["absent", ticket, held]:
                return Absent(ticket, held.decode())
            case [reason]:
                if reason == "erased":
                    # Who is told so takes it for done, and does not ask for the erasure again.
                    await self._scripts.confirm(self._keys.session(session_id))
                return Refused(reason)
        raise Damaged(f"session {masked(session_id)}", "reply", f"of read is {reply[0]}")

    async def hydrate(self, snapshot: Snapshot, ticket: int, hot_ttl_s: int) -> bool:
        """Installs a session that was read from Postgres, also in place of one of an older epoch that Postgres has all of;
        False when the ticket is stale."""
        session, first = snapshot.session, snapshot.first
        stored: dict[str, Argument] = {
            **self._fields.texts(session),
            **{f"t:{number}": encode_turn(turn) for number, turn in enumerate(snapshot.turns, first)},
        }
        reply = await self._scripts.run(
            "hydrate",
            session.session_id,
            self._key(session.session_id, "live", "ticket", "epoch", "running"),
            {"ticket": ticket, "hot_ttl_s": hot_ttl_s, "first_hot": first},
            rest=list(chain.from_iterable(stored.items())),
        )
        return bool(reply[0] == "hydrated")

    async def reconcile(self, session_id: str, ticket: int, stored: Session | None, *, vouched: bool = False) -> Reconciled:
        """Compares a session of an older epoch with what Postgres has of it (None: nothing), read under `ticket`.

        With `vouched` nobody has looked there: it is taken as it is, and looked at again in the next epoch. Raises Damaged.
        """
        arguments: dict[str, Argument] = {
            "ticket": ticket,
            "id": stored.id if stored else "",
            "revision": stored.revision if stored else 0,
            "ended": int(stored is not None and stored.status == "ended"),
            "user_id": stored.user_id if stored else "",
            "vouched": int(vouched),
        }
        reply = await self._scripts.run("reconcile", session_id, self._key(session_id, "ticket", "epoch"), arguments)
        return Reconciled(reply[0])

    async def doubt(self, session_id: str) -> None:
        """Has the session compared with Postgres at its next use."""
        await self._scripts.run("doubt", session_id, self._key(session_id, "ticket"), {})

    async def end(self, session_id: str, access: Access) -> Session | Absent | Refused:
        """Ends the session for good."""
        keys = self._key(session_id, "outbox", "outbox_bytes", "fence", "running", "ticket", "epoch")
        arguments = {**access_arguments(access), "ticket_ms": TICKET_MS, "channel": self._keys.channel(session_id)}
        reply = await self._scripts.run("end", session_id, keys, arguments, durable=True)
        match reply:
            case ["ended", header]:
                return decode_session(header, f"session {masked(session_id)}", self._fields)
            case ["absent", ticket, held]:
                return Absent(ticket, held.decode())
            case _:
                return Refused(reply[0])

    async def time_out(self, session_id: str, idle_ms: int) -> bool | Absent:
        """Marks the session as timed out if it was idle for `idle_ms`; whether it was."""
        keys = self._key(session_id, "outbox", "outbox_bytes", "fence", "ticket", "epoch")
        reply = await self._scripts.run("time_out", session_id, keys, {"idle_ms": idle_ms, "ticket_ms": TICKET_MS})
        return Absent(reply[1], reply[2].decode()) if reply[0] == "absent" else reply[0] == "timed_out"

    async def erase(self, session_id: str, access: Access) -> str | Absent | Refused:
        """Erases the session; returns its UUID."""
        reply = await self._erase(session_id, access, "")
        match reply:
            case ["erased", session_uuid]:
                return str(session_uuid.decode())
            case ["absent", ticket, held]:
                return Absent(ticket, held.decode())
            case _:
                return Refused(reply[0])

    async def erase_idle(self, session_id: str, agent_id: str, idle_ms: int) -> bool | Absent:
        """Erases an agent's session if it was idle for `idle_ms`; whether it was."""
        reply = await self._erase(session_id, Access(agent_id, authorized=True, trusted=True), idle_ms)
        return Absent(reply[1], reply[2].decode()) if reply[0] == "absent" else reply[0] == "erased"

    async def erase_again(self, session_id: str, session_uuid: str) -> bool:
        """Erases a session that Postgres has erased and Redis has forgotten to have; whether it was there."""
        access = Access(authorized=True, trusted=True)
        return bool((await self._erase(session_id, access, "", forgotten=session_uuid))[0] == "erased")

    async def _erase(self, session_id: str, access: Access, idle_ms: int | str, *, forgotten: str = "") -> list[Any]:
        names = ("outbox", "outbox_bytes", "fence", "live", "running", "dead", "ticket", "logs", "epoch")
        keys = self._key(session_id, *names)
        logged = ""
        while True:
            # Only Redis knows which turns have logs, and a script has to be given its keys.
            arguments = {
                **access_arguments(access),
                "group": GROUP,
                "ticket_ms": TICKET_MS,
                "channel": self._keys.channel(session_id),
                "logged": logged,
                "idle_ms": idle_ms,
                "forgotten": forgotten,
            }
            logs = [self._keys.events(session_id, turn_id) for turn_id in logged.split()]
            reply = await self._scripts.run("erase", session_id, [*keys, *logs], arguments)
            if reply[0] == "erased":
                # Not in the call itself: one that only asks for the logs would wait as well, and fail before it has erased.
                await self._scripts.confirm(keys[0])
            if reply[0] != "logs":
                return reply
            logged = reply[1].decode()

    async def forget_logs(self, session_id: str) -> bool:
        """Removes the turn logs of a session that is in neither store; False when it is in Redis."""
        keys, logged = self._key(session_id, "logs"), ""
        while True:
            logs = [self._keys.events(session_id, turn_id) for turn_id in logged.split()]
            reply = await self._scripts.run("forget_logs", session_id, [*keys, *logs], {"logged": logged})
            if reply[0] != "logs":
                return bool(reply[0] == "forgotten")
            logged = reply[1].decode()

    async def reap(self, session_id: str) -> str | None:
        """Gives up a turn whose lease has expired; its turn_id, or None."""
        reply = await self._scripts.run(
            "reap",
            session_id,
            self._key(session_id, "running"),
            {"channel": self._keys.channel(session_id)},
        )
        return reply[1].decode() if reply[0] == "reaped" else None


def access_arguments(access: Access) -> dict[str, str | int]:
    return {
        "agent_id": access.agent_id,
        "website_domain": access.website_domain,
        "authorized": int(access.authorized),
        "user_id": access.user_id,
        "trusted": int(access.trusted),
    }
