"""Runs the Lua scripts, and uses no reply before it has proved that it belongs to the call.

Every script echoes the session id and a nonce made for the call. A reply with another echo belongs to another call: all
connections are dropped, the call fails, and `foreign_replies` counts it. A plain command's reply has no echo, and a client
may hand out a connection that still holds, or will yet receive, the reply to an earlier command: so everything stored is
read and written through this module alone.
"""

import asyncio
import hashlib
from collections.abc import Awaitable, Callable, Mapping, Sequence
from functools import partial
from itertools import count
from secrets import token_hex
from time import monotonic
from typing import Any, NoReturn

import structlog
from redis.exceptions import AskError, NoScriptError, ResponseError

from persistence.errors import CommandRefused, Damaged, ForeignReply, NotReplicated
from persistence.model.fields import SESSION_FIELDS, SessionFields
from persistence.model.ids import masked
from persistence.redis.connection import Client, refusal
from persistence.redis.epochs import Call, RunAll
from persistence.redis.linking import link_scripts
from persistence.redis.pool import Argument, Command, Execute, Leave, leave_at_once, make_pool

log = structlog.get_logger()

SETTLE_AGAIN_S = 1.0
"""How long new connections go ahead without another try, after Postgres could not be asked."""
REPLICATION_TIMEOUT_S = 0.8
"""How long an answer waits for its replicas: less than a reply may take."""

TOUCH = "#!lua flags=allow-oom\nreturn redis.call('SET', KEYS[1], '', 'PX', 60000)"
"""A write to wait for, also while Redis is full: an end or a running turn's commit, which it takes then, waits too."""

Settle = Callable[[str, RunAll], Awaitable[bool]]
"""Begins epochs on a server, by its replication id; whether that is done. Raises PersistenceError."""


class Scripts:
    """The scripts on one Redis, linked with a list of session fields. `foreign_replies` counts replies to other calls.

    `settle` is asked before the first use of each server, and before that `leave` takes leave of a master that Sentinel has
    replaced; without `settle` a partition gets an epoch when a script finds none.
    What is `durable` is answered once `replicas` have it.
    """

    def __init__(
        self,
        client: Client,
        *,
        concurrency: int = 64,
        fields: SessionFields = SESSION_FIELDS,
        settle: Settle | None = None,
        leave: Leave = leave_at_once,
        replicas: int = 0,
    ) -> None:
        self._settle = settle
        self._replicas = replicas
        self._known_servers: set[str] = set()
        self._tried: dict[str, float] = {}
        self._settling = asyncio.Lock()
        self.fields = fields
        linked = link_scripts(fields)
        self.texts: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        for name, script in linked.items():
            self.use(name, script.text)
        self._orders = {name: script.arguments for name, script in linked.items()}
        self._pool = make_pool(client, concurrency=concurrency, introduce=self._introduce, leave=leave)
        self._nonce_head = token_hex(8)
        self._nonce_tail = count()
        self.foreign_replies = 0

    def use(self, name: str, text: str) -> None:
        """Runs this text under the name of a script from now on."""
        self.texts[name] = text
        self._digests[name] = hashlib.sha1(text.encode()).hexdigest()  # noqa: S324

    def server_of(self, key: str) -> str:
        """A name of the server that has `key` as far as is known."""
        return self._pool.server_of(key)

    async def check_servers(self) -> None:
        """Asks every server in use who it is now, and who is master. Raises PersistenceError."""
        await self._pool.check()

    async def switched(self) -> None:
        """Returns when a Sentinel announces another master; never where there are none."""
        await self._pool.switched()

    async def drop_connections(self) -> None:
        """Closes every connection, in use or idle: replies still unread on them are never read."""
        await self._pool.drop()

    async def _introduce(self, server: str, execute: Execute) -> None:
        """Settles a server that this process has not met. Without Postgres it is used all the same, and asked for again."""
        if self._settle is None or server in self._known_servers:
            return
        async with self._settling:
            if server in self._known_servers or monotonic() - self._tried.get(server, -SETTLE_AGAIN_S) < SETTLE_AGAIN_S:
                return
            if await self._settle(server, partial(self._run_all, execute)):
                self._known_servers.add(server)
            else:
                self._tried[server] = monotonic()

    async def _settle_anew(self, key: str) -> None:
        """Settles the partition of `key`, which somebody has emptied."""
        if self._settle is None:
            head = key.partition("}:")[0] + "}:"
            call: dict[str, Argument] = {"server": "", "after": 0, "redo": 0, "fence": 0, "seen": 0, "jump": 0}
            await self._run("settle", "", [f"{head}epoch", f"{head}fence"], call, 1.8)
            return
        self._known_servers.clear()
        self._tried.clear()
        await self._pool.check(anew=True)

    async def _run_all(self, execute: Execute, name: str, calls: Sequence[Call]) -> list[list[Any] | None]:
        """Runs a script several times on one connection; a reply each, [word, ...], None where another server has the
        keys."""
        nonces = [f"{self._nonce_head}-{next(self._nonce_tail)}" for _ in calls]
        tails = [
            (len(keys), *keys, "", nonce, *(arguments[one] for one in self._orders[name]))
            for (keys, arguments), nonce in zip(calls, nonces, strict=True)
        ]
        replies = await execute([("EVALSHA", self._digests[name], *tail) for tail in tails])
        if any(isinstance(reply, NoScriptError) for reply in replies):
            replies = await execute([("EVAL", self.texts[name], *tail) for tail in tails])
        told: list[list[Any] | None] = []
        for reply, nonce in zip(replies, nonces, strict=True):
            if isinstance(reply, AskError):
                told.append(None)
                continue
            if isinstance(reply, ResponseError):
                raise refusal(reply) from reply
            if not self._belongs(reply, "", nonce):
                await self._refuse_foreign(name)
            told.append([reply[0].decode(), *reply[3:]])
        return told

    async def run(
        self,
        name: str,
        session_id: str,
        keys: Sequence[str],
        arguments: Mapping[str, Argument],
        timeout_s: float = 1.8,
        *,
        rest: Sequence[Argument] = (),
        durable: bool = False,
    ) -> list[Any]:
        """Runs a script; returns its reply without the echo: [word, ...], the word as str.

        `arguments` has those of the script's ARGV list, and may have others; `rest` follows them where the list ends in
        `...`. What is `durable` is on the replicas when it returns. Raises RedisUnavailable (ForeignReply when the echo is
        wrong, NotReplicated when too few replicas have it in time), Damaged when the script found a damaged field.
        """
        if durable and self._replicas:
            return await self._run_replicated(name, session_id, keys, arguments, rest)
        return (await self._run(name, session_id, keys, arguments, timeout_s, rest=rest))[0]

    async def _run_replicated(
        self, name: str, session_id: str, keys: Sequence[str], arguments: Mapping[str, Argument], rest: Sequence[Argument]
    ) -> list[Any]:
        # WAIT waits for the writes of its own connection. A script that is repeated on another one may write nothing: the
        # write between them is behind all that the script has found.
        awaited = keys[0].partition("}:")[0] + "}:awaited"
        behind: list[Command] = [
            ("EVAL", TOUCH, 1, awaited),
            ("WAIT", self._replicas, int(REPLICATION_TIMEOUT_S * 1000)),
        ]
        reply, others = await self._run(name, session_id, keys, arguments, 1.8, rest=rest, behind=behind)
        for other in others:
            if isinstance(other, ResponseError):
                raise refusal(other) from other
        if others[-1] < self._replicas:
            raise NotReplicated(f"{others[-1]} of {self._replicas} replicas have it")
        return reply

    async def confirm(self, key: str) -> None:
        """Returns once the replicas have all that is stored about the partition of `key`. Raises as `run` does."""
        if self._replicas:
            await self.run("command", "", [key], {"command": "EXISTS"}, durable=True)

    async def run_and_read(
        self, name: str, session_id: str, keys: Sequence[str], arguments: Mapping[str, Argument], timeout_s: float = 1.8
    ) -> tuple[list[Any], dict[bytes, bytes]]:
        """Runs a script and, in the same round trip, reads the hash that is its first key: [word, ...] and the hash.

        The hash's echo is its session_id. It is read a moment after the script, so another call may have changed it.
        """
        reply, (fields,) = await self._run(name, session_id, keys, arguments, timeout_s, behind=[("HGETALL", keys[0])])
        if isinstance(fields, ResponseError):
            raise refusal(fields) from fields
        if isinstance(fields, list):  # the client of a cluster makes a dict of it
            fields = dict(zip(fields[::2], fields[1::2], strict=False))
        if not isinstance(fields, dict) or (fields and fields.get(b"session_id") != session_id.encode()):
            await self._refuse_foreign(name)
        return reply, fields

    async def read_and_run(
        self,
        command: Command,
        name: str,
        session_id: str,
        keys: Sequence[str],
        arguments: Mapping[str, Argument],
        timeout_s: float = 1.8,
    ) -> Any:
        """The reply to a plain command, with a script behind it in the same round trip.

        The script's echo in its place proves that the reply before it is the command's own. Both may run twice. Raises as
        `run` does.
        """
        _, (reply,) = await self._run(name, session_id, keys, arguments, timeout_s, before=[command])
        if isinstance(reply, ResponseError):
            raise refusal(reply) from reply
        return reply

    async def _run(
        self,
        name: str,
        session_id: str,
        keys: Sequence[str],
        arguments: Mapping[str, Argument],
        timeout_s: float,
        *,
        rest: Sequence[Argument] = (),
        before: Sequence[Command] = (),
        behind: Sequence[Command] = (),
    ) -> tuple[list[Any], list[Any]]:
        """The script's reply, without its echo, and the replies to commands that are sent before it or behind it."""
        nonce = f"{self._nonce_head}-{next(self._nonce_tail)}"
        tail = [*keys, session_id, nonce, *(arguments[one] for one in self._orders[name]), *rest]
        reply, others = await self._evaluate(name, keys, tail, timeout_s, before, behind)
        if isinstance(reply, ResponseError):
            # An error has no echo. That of a script names the script; any other belongs to another command.
            error = refusal(reply)
            if not isinstance(error, CommandRefused) or "@user_script" in str(error):
                raise error from reply
        if not self._belongs(reply, session_id, nonce):
            await self._refuse_foreign(name)
        word = reply[0].decode()
        if word == "damaged":
            field = reply[3].decode(errors="replace")
            raise Damaged(f"session {masked(session_id)}", field, "is missing or unreadable in Redis")
        if word == "unsettled":
            await self._settle_anew(keys[0])
            return await self._run(name, session_id, keys, arguments, timeout_s, rest=rest, before=before, behind=behind)
        return [word, *reply[3:]], others

    async def _refuse_foreign(self, name: str) -> NoReturn:
        self.foreign_replies += 1
        log.error("redis.foreign_reply", script=name)
        await self.drop_connections()
        raise ForeignReply(f"the reply to {name} belongs to another call")

    def _belongs(self, reply: Any, session_id: str, nonce: str) -> bool:
        return (
            isinstance(reply, list)
            and len(reply) >= 3
            and reply[2] == nonce.encode()
            and reply[1] == session_id.encode()
            and isinstance(reply[0], bytes)
        )

    async def command(self, command: str, key: str, *arguments: Argument, timeout_s: float = 1.8) -> Any:
        """Runs one command on one key; its reply as in RESP2, a hash as [field, value, ...]. Raises as `run` does."""
        return (await self.run("command", "", [key], {"command": command}, timeout_s, rest=arguments))[1]

    async def _evaluate(
        self,
        name: str,
        keys: Sequence[str],
        tail: list[Argument],
        timeout_s: float,
        before: Sequence[Command] = (),
        behind: Sequence[Command] = (),
    ) -> tuple[Any, list[Any]]:
        """The reply to the script, and to the commands before it and behind it."""
        for word, script in (("EVALSHA", self._digests[name]), ("EVAL", self.texts[name])):
            call = (word, script, len(keys), *tail)
            replies = await self._pool.execute([*before, call, *behind], keys[0], timeout_s)
            reply = replies.pop(len(before))
            if not isinstance(reply, NoScriptError):
                break
        return reply, replies
