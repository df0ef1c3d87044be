"""Runs the Lua scripts, and uses no reply before it has proved that it belongs to the call.

Every script echoes the session id and a nonce made for the call. A reply with another echo belongs to another call: all
connections are dropped, the call fails, and `foreign_replies` counts it. A plain command's reply has no echo, and a client
may hand out a connection that still holds, or will yet receive, the reply to an earlier command: so everything stored is
read and written through this module alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from itertools import count
from secrets import token_hex
from typing import Any, NoReturn

import structlog
from redis.exceptions import NoScriptError, ResponseError

from persistence.errors import CommandRefused, Damaged, ForeignReply
from persistence.model.fields import SESSION_FIELDS, SessionFields
from persistence.model.ids import masked
from persistence.redis.connection import Client, drop_connections, refusal
from persistence.redis.linking import link_scripts
from persistence.redis.pool import Argument, Command, make_pool

log = structlog.get_logger()


class Scripts:
    """The scripts on one Redis, linked with a list of session fields. `foreign_replies` counts replies to other calls."""

    def __init__(self, client: Client, *, concurrency: int = 64, fields: SessionFields = SESSION_FIELDS) -> None:
        self._client = client
        self.fields = fields
        linked = link_scripts(fields)
        self.texts: dict[str, str] = {}
        self._digests: dict[str, str] = {}
        for name, script in linked.items():
            self.use(name, script.text)
        self._orders = {name: script.arguments for name, script in linked.items()}
        self._pool = make_pool(client, concurrency=concurrency)
        self._nonce_head = token_hex(8)
        self._nonce_tail = count()
        self.foreign_replies = 0

    def use(self, name: str, text: str) -> None:
        """Runs this text under the name of a script from now on."""
        self.texts[name] = text
        self._digests[name] = hashlib.sha1(text.encode()).hexdigest()  # noqa: S324

    async def run(
        self,
        name: str,
        session_id: str,
        keys: Sequence[str],
        arguments: Mapping[str, Argument],
        timeout_s: float = 1.8,
        *,
        rest: Sequence[Argument] = (),
    ) -> list[Any]:
        """Runs a script; returns its reply without the echo: [word, ...], the word as str.

        `arguments` has those of the script's ARGV list, and may have others; `rest` follows them where the list ends in
        `...`. Raises RedisUnavailable (ForeignReply when the echo is wrong), Damaged when the script found a damaged field.
        """
        return (await self._run(name, session_id, keys, arguments, timeout_s, rest=rest))[0]

    async def run_and_read(
        self, name: str, session_id: str, keys: Sequence[str], arguments: Mapping[str, Argument], timeout_s: float = 1.8
    ) -> tuple[list[Any], dict[bytes, bytes]]:
        """Runs a script and, in the same round trip, reads the hash that is its first key: [word, ...] and the hash.

        The hash's echo is its session_id. It is read a moment after the script, so another call may have changed it.
        """
        reply, fields = await self._run(name, session_id, keys, arguments, timeout_s, behind=("HGETALL", keys[0]))
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
        _, reply = await self._run(name, session_id, keys, arguments, timeout_s, before=command)
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
        before: Command | None = None,
        behind: Command | None = None,
    ) -> tuple[list[Any], Any]:
        """The script's reply, without its echo, and the reply to a command that is sent before it or behind it."""
        nonce = f"{self._nonce_head}-{next(self._nonce_tail)}"
        tail = [*keys, session_id, nonce, *(arguments[one] for one in self._orders[name]), *rest]
        reply, other = await self._evaluate(name, len(keys), tail, timeout_s, before, behind)
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
        return [word, *reply[3:]], other

    async def _refuse_foreign(self, name: str) -> NoReturn:
        self.foreign_replies += 1
        log.error("redis.foreign_reply", script=name)
        await drop_connections(self._client)
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
        key_count: int,
        tail: list[Argument],
        timeout_s: float,
        before: Command | None = None,
        behind: Command | None = None,
    ) -> tuple[Any, Any]:
        """The reply to the script, and to the command before it or behind it (None without one)."""
        for word, script in (("EVALSHA", self._digests[name]), ("EVAL", self.texts[name])):
            call, other = (word, script, key_count, *tail), None
            if before is not None:
                other, reply = await self._pool.execute([before, call], timeout_s)
            elif behind is not None:
                reply, other = await self._pool.execute([call, behind], timeout_s)
            else:
                (reply,) = await self._pool.execute([call], timeout_s)
            if not isinstance(reply, NoScriptError):
                break
        return reply, other
