"""Runs the Lua scripts, and uses no reply before it has proved that it belongs to the call.

Every script echoes the session id and a nonce made for the call. A reply that echoes anything else was meant for
somebody else: all connections are dropped, the call fails, and `foreign_replies` counts it. A plain command's reply tells
nothing of the kind, and a client may hand out a connection that still holds, or will yet receive, the reply to an older
question: what is stored is read and written through here alone.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from itertools import count
from secrets import token_hex
from typing import Any, NoReturn

import structlog
from redis.exceptions import NoScriptError, ResponseError

from persistence.errors import CommandRefused, Damaged, ForeignReply
from persistence.model.ids import masked
from persistence.redis.connection import Client, drop_connections, refusal
from persistence.redis.pool import Argument, Command, make_pool

log = structlog.get_logger()

_BLOCKS = re.compile(r"\n\n(?=(?:--[^\n]*\n)*local )")
_NAME = re.compile(r"^local (?:function )?(\w+)", re.MULTILINE)
_COMMENT = re.compile(r"--[^\n]*")
_ORDER = re.compile(r"(\w+) = ARGV\[\d+\]")


def script_texts() -> dict[str, str]:
    """The text of every script by name, what it uses of the prelude put behind its first line."""
    folder = files("persistence") / "lua"
    prelude = (folder / "prelude.lua").read_text()
    return {
        file.name.removesuffix(".lua"): with_prelude(file.read_text(), prelude)
        for file in folder.iterdir()
        if file.name.endswith(".lua") and file.name != "prelude.lua"
    }


def with_prelude(script: str, prelude: str) -> str:
    """The script with the blocks of the prelude whose names are used in it, or in another such block.

    A script's whole text is run at each call: with all of the prelude a turn takes Redis twice the time.
    """
    first, text = script.split("\n", 1)
    for block in reversed(_BLOCKS.split(prelude)):
        named = _NAME.search(block)
        if named and re.search(rf"\b{named[1]}\b", _COMMENT.sub("", text)):
            text = f"{block}\n\n{text}"
    return f"{first}\n{text}"


class Scripts:
    """The scripts on one Redis. `foreign_replies` counts replies that were not for the call that read them."""

    def __init__(self, client: Client, *, concurrency: int = 64) -> None:
        self._client = client
        self._texts = script_texts()
        self._digests = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in self._texts.items()}  # noqa: S324
        self._orders = {name: _ORDER.findall(text)[2:] for name, text in self._texts.items()}
        self._pool = make_pool(client, concurrency=concurrency)
        self._nonce_head = token_hex(8)
        self._nonce_tail = count()
        self.foreign_replies = 0

    async def run(
        self, name: str, session_id: str, keys: Sequence[str], arguments: Mapping[str, Argument], timeout_s: float = 1.8
    ) -> list[Any]:
        """Runs a script; returns its reply without the echo: [word, ...], the word as str.

        Raises RedisUnavailable (ForeignReply when the echo is wrong), Damaged when the script found a field it can't use.
        """
        return (await self._run(name, session_id, keys, arguments, timeout_s))[0]

    async def run_and_read(
        self, name: str, session_id: str, keys: Sequence[str], arguments: Mapping[str, Argument], timeout_s: float = 1.8
    ) -> tuple[list[Any], dict[bytes, bytes]]:
        """Runs a script and, in the same round trip, reads the hash that is its first key: [word, ...] and what is in it.

        The hash's echo is its session_id. It is read a moment later: who needs what the script wrote looks for it.
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
        """The reply to a plain command, behind which a script runs in the same round trip.

        That the script's echo is where it belongs proves that the reply before it is the command's own. Both may run twice.
        Raises as `run` does.
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
        before: Command | None = None,
        behind: Command | None = None,
    ) -> tuple[list[Any], Any]:
        """The script's reply, without its echo, and the reply to a command that is sent before it or behind it."""
        nonce = f"{self._nonce_head}-{next(self._nonce_tail)}"
        order = self._orders[name]
        tail: list[Argument]
        if order:
            # Scripts that are run often say the order of their arguments; names would double them.
            tail = [*keys, session_id, nonce, *(arguments[one] for one in order)]
        else:
            tail = [*keys, "session_id", session_id, "nonce", nonce]
            for pair in arguments.items():
                tail += pair
        reply, other = await self._evaluate(name, len(keys), tail, timeout_s, before, behind)
        if isinstance(reply, ResponseError):
            # An error has no echo. One that a script met says where in it; others belong to another command.
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
        """Runs one command on one key; its reply as RESP2 has it, a hash as [field, value, ...]. Raises as `run` does."""
        numbered = {str(number): argument for number, argument in enumerate(arguments, 1)}
        return (await self.run("command", "", [key], {"command": command, **numbered}, timeout_s))[1]

    async def _evaluate(
        self,
        name: str,
        key_count: int,
        tail: list[Argument],
        timeout_s: float,
        before: Command | None = None,
        behind: Command | None = None,
    ) -> tuple[Any, Any]:
        """The reply to the script, and that to the command before it or behind it (None: there is none)."""
        for word, script in (("EVALSHA", self._digests[name]), ("EVAL", self._texts[name])):
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
