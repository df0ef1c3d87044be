"""Runs the Lua scripts, and uses no reply before it has proved that it belongs to the call.

Every script echoes the session id and a nonce made for the call. A reply that echoes anything else was meant for
somebody else: all connections are dropped, the call fails, and `foreign_replies` counts it. A plain command's reply tells
nothing of the kind, and a client may hand out a connection that still holds, or will yet receive, the reply to an older
question: what is stored is read and written through here alone.
"""

import asyncio
import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.resources import files
from itertools import count
from secrets import token_hex
from typing import Any

import structlog
from redis.exceptions import NoScriptError

from persistence.connection import Client, call, drop_connections
from persistence.errors import CommandRefused, Damaged, ForeignReply
from persistence.keys import masked

log = structlog.get_logger()

Argument = str | bytes | int | float


def script_texts() -> dict[str, str]:
    """The text of every script by name, the prelude put behind its first line."""
    folder = files("persistence") / "lua"
    prelude = (folder / "prelude.lua").read_text()
    texts = {}
    for file in folder.iterdir():
        if file.name.endswith(".lua") and file.name != "prelude.lua":
            first, rest = file.read_text().split("\n", 1)
            texts[file.name.removesuffix(".lua")] = f"{first}\n{prelude}\n{rest}"
    return texts


class Scripts:
    """The scripts on one Redis. `foreign_replies` counts replies that were not for the call that read them."""

    def __init__(self, client: Client, *, concurrency: int = 64) -> None:
        self._client = client
        self._texts = script_texts()
        self._digests = {name: hashlib.sha1(text.encode()).hexdigest() for name, text in self._texts.items()}  # noqa: S324
        # Bounds the connections, so that no pool ever runs out.
        self._free = asyncio.Semaphore(concurrency)
        self._nonce_head = token_hex(8)
        self._nonce_tail = count()
        self.foreign_replies = 0

    async def run(
        self, name: str, session_id: str, keys: Sequence[str], arguments: Mapping[str, Argument], timeout_s: float = 1.8
    ) -> list[Any]:
        """Runs a script; returns its reply without the echo: [word, ...], the word as str.

        Raises RedisUnavailable (ForeignReply when the echo is wrong), Damaged when the script found a field it can't use.
        """
        nonce = f"{self._nonce_head}-{next(self._nonce_tail)}"
        tail: list[Argument] = [*keys, "session_id", session_id, "nonce", nonce]
        for pair in arguments.items():
            tail += pair
        try:
            reply = await call(partial(self._evaluate, name, len(keys), tail), timeout_s)
        except CommandRefused as error:
            # An error has no echo. One that a script met says where in it; others belong to another command.
            if "@user_script" in str(error):
                raise
            reply = None
        if not self._belongs(reply, session_id, nonce):
            self.foreign_replies += 1
            log.error("redis.foreign_reply", script=name)
            await drop_connections(self._client)
            raise ForeignReply(f"the reply to {name} belongs to another call")
        word = reply[0].decode()
        if word == "damaged":
            field = reply[3].decode(errors="replace")
            raise Damaged(f"session {masked(session_id)}", field, "is missing or unreadable in Redis")
        return [word, *reply[3:]]

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

    async def _evaluate(self, name: str, key_count: int, tail: list[Argument]) -> Any:
        async with self._free:
            try:
                return await self._client.execute_command("EVALSHA", self._digests[name], key_count, *tail)
            except NoScriptError:
                return await self._client.execute_command("EVAL", self._texts[name], key_count, *tail)
