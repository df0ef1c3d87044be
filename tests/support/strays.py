"""Replies where they do not belong: on idle pooled connections, and from clients that put connections back too early."""

from asyncio import StreamWriter
from typing import Any

from redis.asyncio import Connection, Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import AbstractConnection

from persistence.redis.connection import connect
from persistence.redis.keys import Keys
from persistence.redis.linking import link_scripts
from persistence.redis.pool import Argument, ClusterPool, HeldPool, Server
from persistence.redis.scripts import Scripts
from tests.support.serving import wait_for


def question(keys: Keys, session_id: str) -> list[str | int]:
    """What `read` sends about a session."""
    head = keys.head(session_id)
    names = [keys.session(session_id), f"{head}fence", f"{head}ticket:{session_id}", f"{head}epoch"]
    given = {
        "agent_id": "",
        "website_domain": "",
        "authorized": "1",
        "user_id": "",
        "trusted": "",
        "count": "10",
        "ticket_ms": "1000",
        "any_epoch": "0",
    }
    text, order = link_scripts()["read"]
    return ["EVAL", text, len(names), *names, session_id, "old", *(given[name] for name in order)]


async def leave_reply(
    client: Redis | RedisCluster, *command: str | int, scripts: Scripts | None = None
) -> list[StreamWriter]:
    """Sends a command on an idle connection and puts it back with its reply unread, as a call that was cancelled might.

    On a cluster on every node, but a command about a key on that key's node alone. On the connection that `scripts` will
    take next, if they are given. The sockets that hold it.
    """
    if not isinstance(client, RedisCluster):
        connection: Connection = await client.connection_pool.get_connection()  # type: ignore[no-untyped-call]
        socket = await _ask(connection, command)
        if scripts is None:
            await client.connection_pool.release(connection)
        else:
            assert isinstance(scripts._pool, HeldPool)
            _next_one(scripts._pool.server, connection)
        return [socket]
    nodes = list(client.get_primaries())
    if command[2] != 0:
        nodes = [client.get_node_from_key(str(command[3]))]  # type: ignore[list-item]
    return [await _leave_on(node, command, scripts) for node in nodes]


async def _leave_on(node: ClusterNode, command: tuple[str | int, ...], scripts: Scripts | None) -> StreamWriter:
    # The pool looks whether bytes have come; what comes after its look has to be planted where nobody looks.
    usual, node.connection_class = node.connection_class, CarelessConnection
    node._free.clear()
    connection = node.acquire_connection()
    node.connection_class = usual
    await connection.connect()  # type: ignore[no-untyped-call]
    socket = await _ask(connection, command)
    if scripts is None:
        node._free.appendleft(connection)
    else:
        assert isinstance(scripts._pool, ClusterPool)
        _next_one(scripts._pool._held(node), connection)
    return socket


def _next_one(server: Server, connection: AbstractConnection) -> None:
    """Has the next call use this connection, which has been introduced."""
    server.held.append(connection)
    server._known.add(connection)
    server.idle.append(connection)


async def _ask(connection: Any, command: tuple[str | int, ...]) -> StreamWriter:
    await connection.send_command(*command)
    # Whether bytes have come that nobody has read.
    await wait_for(lambda: connection._reader._buffer, "the reply arrives")
    socket: StreamWriter = connection._writer
    return socket


class TrustingScripts(Scripts):
    """Control: uses whatever reply it reads, but for what it could not take apart."""

    def _belongs(self, reply: Any, session_id: str, nonce: str) -> bool:
        return isinstance(reply, list) and bool(reply) and isinstance(reply[0], bytes)

    async def command(self, command: str, key: str, *arguments: Argument, timeout_s: float = 1.8) -> Any:
        """As a plain command: there is nothing in its reply to look at."""
        tail: list[Argument] = [key, "", "none", command, *arguments]
        reply = (await self._evaluate("command", [key], tail, timeout_s))[0]
        return reply[3] if isinstance(reply, list) and reply[2:3] == [b"none"] else reply


class CarelessConnection(Connection):
    """A call that is cancelled while it waits leaves its connection open and its reply to the next one, as in redis-py
    before 4.5.3; and whoever looks before using it looks too early."""

    async def can_read(self) -> bool:
        return False

    async def read_response(self, *arguments: Any, **named: Any) -> Any:
        return await super().read_response(*arguments, **{**named, "disconnect_on_error": False})

    async def disconnect(self, nowait: bool = False, *others: Any, **named: Any) -> None:
        # What closes a connection of which not every reply was read.
        if not nowait:
            await super().disconnect(nowait, *others, **named)


async def careless(url: str) -> Redis | RedisCluster:
    """A client with such connections."""
    client = connect(url)
    if not isinstance(client, RedisCluster):
        client.connection_pool.connection_class = CarelessConnection
        return client
    await client.initialize()
    for node in client.get_nodes():
        await node.disconnect()
        node._connections.clear()
        node._free.clear()
        node.connection_class = CarelessConnection
    return client
