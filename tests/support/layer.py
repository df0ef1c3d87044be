"""The Redis layer alone, for tests: no HTTP and no Postgres. What was flushed is what the test took off the outbox."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

from uuid_utils.compat import uuid7

from persistence.model.agents import TurnPolicy
from persistence.model.codec import decode_record
from persistence.model.session import Access, Message, NewSession, Record, Session, Turn
from persistence.model.times import iso
from persistence.redis.connection import Client, connect
from persistence.redis.keys import Keys
from persistence.redis.outbox import Outbox
from persistence.redis.outcomes import Absent, Begun, Committed, Hot, Opened
from persistence.redis.scripts import Scripts
from persistence.redis.server_check import check_server
from persistence.redis.sessions import SessionStore
from tests.support.rule import all_keys, breaches

AGENT_ID = "01900000-0000-7000-8000-00000000a9e1"
DOMAIN = "shop.example"
ACCESS = Access(AGENT_ID, DOMAIN)
OPERATOR = Access(authorized=True, trusted=True)
POLICY = TurnPolicy(hot_turns=25, hot_ttl_s=1800)

_numbers = count(1_000_000_000_000)


def new_id() -> str:
    """A session id as a browser makes one up; another one at every call."""
    return f"session_{next(_numbers)}_abc123xyz"


def new_session(session_id: str, **changed: Any) -> NewSession:
    """What a session is created with; `user_agent` tells whose it is."""
    fields: dict[str, Any] = {
        "id": str(uuid7()),
        "session_id": session_id,
        "agent_id": AGENT_ID,
        "channel": "text",
        "website_domain": DOMAIN,
        "user_id": "",
        "ip_address": "192.0.2.1",
        "user_agent": f"browser of {session_id}",
        "metadata": {"page": "/"},
        "minted": False,
        "hot_ttl_s": 1800,
    }
    return NewSession(**{**fields, **changed})


def new_turn(begun: Begun, turn_id: str, message_id: str = "", text: str = "Hello") -> Turn:
    """The turn that answers `text`, with the numbers that follow what `begin` gave."""
    at = iso(begun.now_ms)
    messages = [
        Message(str(uuid7()), "user", text, at),
        Message(str(uuid7()), "assistant", f"You said: {text}", at),
    ]
    return Turn(turn_id, message_id or None, begun.session.message_count + 1, messages)


def messages_of(turns: Sequence[Turn]) -> list[Message]:
    """The messages of turns, oldest first."""
    return [message for turn in turns for message in turn.messages]


class Layer:
    """The Redis layer on one server, and the steps that tests need all the time."""

    def __init__(
        self,
        client: Client,
        keys: Keys,
        scripts: Scripts | None = None,
        *,
        lease_ms: int = 15_000,
        max_backlog: int = 200_000,
        max_backlog_bytes: int = 2**30,
    ) -> None:
        self.client = client
        self.keys = keys
        self.scripts = scripts or Scripts(client)
        self.sessions = SessionStore(
            self.scripts, keys, lease_ms=lease_ms, max_backlog=max_backlog, max_backlog_bytes=max_backlog_bytes
        )
        self.outbox = Outbox(self.scripts, keys, "tester")

    async def open(self, session_id: str = "", **changed: Any) -> Session:
        """A new session."""
        new = new_session(session_id or new_id(), **changed)
        opened = await self.sessions.open(new)
        if isinstance(opened, Absent):
            opened = await self.sessions.open(new, ticket=opened.ticket)
        assert isinstance(opened, Opened), opened
        assert opened.created
        return opened.session

    async def begin(
        self, session_id: str, turn_id: str = "", policy: TurnPolicy = POLICY, message_id: str = ""
    ) -> tuple[Begun, str]:
        """A turn that holds the session, and its id."""
        turn_id = turn_id or str(uuid7())
        begun = await self.sessions.begin(session_id, turn_id, ACCESS, policy, message_id=message_id)
        assert isinstance(begun, Begun), begun
        return begun, turn_id

    async def commit(
        self, begun: Begun, turn: Turn, policy: TurnPolicy = POLICY, context: dict[str, Any] | None = None
    ) -> Committed | None:
        """Commits what `begun` began."""
        return await self.sessions.commit(begun, turn, policy, context)

    async def chat(
        self,
        session_id: str,
        text: str = "Hello",
        message_id: str = "",
        policy: TurnPolicy = POLICY,
        context: dict[str, Any] | None = None,
    ) -> Turn:
        """A whole turn."""
        begun, turn_id = await self.begin(session_id, policy=policy, message_id=message_id)
        turn = new_turn(begun, turn_id, message_id, text)
        assert await self.commit(begun, turn, policy, context) is not None
        return turn

    async def take(self, partition: int = 0) -> list[Record]:
        """What is new on the outbox."""
        return [decode_record(*entry) for entry in (await self.outbox.take(partition, 1000)).entries]

    async def flush(self, partition: int = 0) -> list[Record]:
        """Says of all that is new on the outbox that Postgres has it."""
        taken = await self.outbox.take(partition, 1000)
        records = [decode_record(*entry) for entry in taken.entries]
        if records:
            await self.outbox.mark_flushed(partition, records, taken.epoch)
        return records

    async def read(self, session_id: str, turns: int = 1000) -> Hot:
        """The session as an operator sees it, with its hot turns."""
        hot = await self.sessions.read(session_id, OPERATOR, turns)
        assert isinstance(hot, Hot), hot
        return hot

    async def fields(self, session_id: str) -> dict[str, str]:
        """The session hash."""
        found = await self.client.execute_command("HGETALL", self.keys.session(session_id))
        return {name.decode(): value.decode(errors="replace") for name, value in found.items()}

    async def set(self, session_id: str, /, **fields: str | bytes | int) -> None:
        """Writes fields of the session hash behind the scripts' back."""
        flat = [part for pair in fields.items() for part in pair]
        await self.client.execute_command("HSET", self.keys.session(session_id), *flat)

    async def has_ttl(self, session_id: str) -> bool:
        """Whether the session hash has a TTL. Fails when there is no hash."""
        ttl = await self.client.execute_command("PTTL", self.keys.session(session_id))
        assert ttl != -2, "there is no such session"
        return bool(ttl != -1)

    async def evict(self, session_id: str) -> None:
        """What volatile-lru may do: the session leaves Redis, which it must be ready for."""
        assert await self.has_ttl(session_id), "Redis evicts nothing that has no TTL"
        await self.client.execute_command("DEL", self.keys.session(session_id))

    async def redis_ms(self) -> int:
        """Redis' clock."""
        seconds, microseconds = await self.client.execute_command("TIME")
        return int(seconds) * 1000 + int(microseconds) // 1000

    async def dump(self) -> dict[str, Any]:
        """All that is under the prefix, by key; of a TTL only whether there is one."""
        readers = {
            b"hash": ("HGETALL",),
            b"stream": ("XRANGE", "-", "+"),
            b"zset": ("ZRANGE", 0, -1, "WITHSCORES"),
            b"string": ("GET",),
        }
        found = {}
        for key in await all_keys(self.client, self.keys):
            command, *rest = readers[await self.client.execute_command("TYPE", key)]
            ttl = await self.client.execute_command("PTTL", key)
            found[key] = (await self.client.execute_command(command, key, *rest), ttl != -1)
        return found


@asynccontextmanager
async def redis_layer(url: str, *, checked: bool = True, partitions: int = 1, **settings: Any) -> AsyncIterator[Layer]:
    """The layer on an emptied single Redis; at the end the rules are checked, unless the test broke one on purpose."""
    client = connect(url)
    await client.flushall()
    layer = Layer(client, Keys("gw", partitions), **settings)
    await check_server(client, layer.keys)
    try:
        yield layer
        wrong = await breaches(client, layer.keys) if checked else []
        assert not wrong, "; ".join(wrong)
    finally:
        await client.aclose()
