"""Clients of Redis: how they connect, one call bounded in time, and redis-py's errors as this package's own.

Timeouts are explicit and retries few, so that a visitor gets an answer within 2 s. Repeating a call is safe: every write
script checks an id.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from typing import Any

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import MasterNotFoundError, Sentinel
from redis.backoff import AbstractBackoff
from redis.exceptions import ClusterCrossSlotError, RedisClusterException, RedisError, ResponseError
from redis.utils import str_if_bytes

from persistence.errors import CommandRefused, PersistenceError, RedisUnavailable
from persistence.redis.urls import RedisUrl, parse_url
from persistence.retry import Backoff
from persistence.tasks import retrieve

Client = Redis | RedisCluster

CONNECT_TIMEOUT_S = 0.5
REPLY_TIMEOUT_S = 1.0
CALL_TIMEOUT_S = 1.8
RETRIES = 2
BACKOFF = Backoff(0.04, 0.2, jitter=True)
MAX_CONNECTIONS = 1024
LAST_WORD_S = 0.1
"""How long the last Sentinels may take to answer once a majority has."""
LISTEN_S = 5.0
"""A subscription to a Sentinel that was silent for so long is asked with PING; one that broke is made again after it."""


class _OurBackoff(AbstractBackoff):
    """Makes redis-py's own retries, as when it connects, follow the same rule as this package's."""

    def compute(self, failures: int) -> float:
        return BACKOFF.pause_s(failures)


def connection_options() -> dict[str, Any]:
    """What every connection is made with, in redis-py's names."""
    return {
        # With RESP3 the pool of redis-py 8.1 hands out connections that still hold an unread reply; with RESP2 it looks.
        "protocol": 2,
        "socket_timeout": REPLY_TIMEOUT_S,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_keepalive": True,
        "health_check_interval": 0,
        "decode_responses": False,
        # No CLIENT SETINFO on connecting: redis-py ignores its reply, even if that is the reply to another command.
        "driver_info": None,
        "retry": Retry(_OurBackoff(), RETRIES),
    }


def connect(url: str) -> Client:
    """A client for `url` (`urls.py` has the spellings); nothing is sent yet. Raises UnusableUrl or another ValueError."""
    parsed = parse_url(url)
    if parsed.kind == "single":
        return Redis.from_url(url, max_connections=MAX_CONNECTIONS, **connection_options())
    options = connection_options() | {"username": parsed.username, "password": parsed.password}
    if parsed.tls:
        options["ssl"] = True
    return _connect_cluster(parsed, options) if parsed.kind == "cluster" else _connect_sentinel(parsed, options)


def connect_to(url: str, address: tuple[str, int]) -> Redis:
    """A client for one server among those that `url` is about."""
    parsed, (host, port) = parse_url(url), address
    options = connection_options() | {"username": parsed.username, "password": parsed.password, "db": parsed.db}
    return Redis(host=host, port=port, ssl=parsed.tls, **options)


def _connect_cluster(url: RedisUrl, options: dict[str, Any]) -> RedisCluster:
    nodes = [ClusterNode(host, port) for host, port in url.hosts]
    return RedisCluster(startup_nodes=nodes, max_connections=MAX_CONNECTIONS, **options)


class NewestSentinel(Sentinel):
    """Asks all Sentinels at once, and believes the one that knows of the latest failover: the first that answers may be cut
    off with an old master."""

    async def discover_master(self, service_name: str) -> tuple[str, int]:
        """The address of the master. Raises MasterNotFoundError."""
        asked = {asyncio.ensure_future(self._state(sentinel, service_name)) for sentinel in self.sentinels}
        for task in asked:
            task.add_done_callback(retrieve)
        pending, told = asked, list[tuple[int, str, int]]()
        try:
            # A majority has agreed to every failover; that it is over one of them may be the first to know.
            while pending:
                enough = len(told) > len(asked) // 2
                done, pending = await asyncio.wait(
                    pending, timeout=LAST_WORD_S if enough else None, return_when=asyncio.FIRST_COMPLETED
                )
                told += [state for task in done if (state := task.result()) is not None]
                if enough and not done:
                    break
        finally:
            for task in asked:
                task.cancel()
        if not told:
            raise MasterNotFoundError(f"no Sentinel knows a master of {service_name!r}")
        _, host, port = max(told)
        return host, port

    async def switched(self) -> None:
        """Returns when a Sentinel announces a failover."""
        listening = [asyncio.ensure_future(self._listen(sentinel)) for sentinel in self.sentinels]
        try:
            await asyncio.wait(listening, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in listening:
                task.cancel()
            await asyncio.gather(*listening, return_exceptions=True)

    @staticmethod
    async def _listen(sentinel: Redis) -> None:
        while True:
            pubsub = sentinel.pubsub()
            try:
                await pubsub.subscribe("+switch-master", "+promoted-slave")
                while True:
                    message = await pubsub.get_message(ignore_subscribe_messages=True, timeout=LISTEN_S)
                    if message is not None:
                        return
                    await pubsub.ping()
            except Exception:
                # Of any type, as with stray bytes: whoever waits would take the end of this for news. A Sentinel may be down
                # for long; the master is asked for every second all the same.
                await asyncio.sleep(LISTEN_S)
            finally:
                await pubsub.aclose()  # type: ignore[no-untyped-call]

    async def _state(self, sentinel: Redis, service_name: str) -> tuple[int, str, int] | None:
        """The number of the latest failover that a Sentinel knows of, and the master since; None unless it is up."""
        try:
            states: Any = await sentinel.sentinel_masters()
            # Tells of a promoted replica before the state does.
            address: Any = await sentinel.sentinel_get_master_addr_by_name(service_name)
        except (RedisError, OSError):
            return None
        state = states.get(service_name)
        if state is None or not address:
            return None
        host, port = str_if_bytes(address[0]), int(address[1])
        promoted = (host, port) != (state["ip"], state["port"])
        if not promoted and not self.check_master_state(state, service_name):
            return None
        return int(state["config-epoch"]), host, port


def _connect_sentinel(url: RedisUrl, options: dict[str, Any]) -> Redis:
    sentinel_options = {name: options[name] for name in ("protocol", "socket_timeout", "socket_connect_timeout")}
    if url.tls:
        sentinel_options["ssl"] = True
    if url.sentinel_username:
        sentinel_options["username"] = url.sentinel_username
    if url.sentinel_password:
        sentinel_options["password"] = url.sentinel_password
    sentinel = NewestSentinel(list(url.hosts), sentinel_kwargs=sentinel_options, **options, db=url.db)  # type: ignore[no-untyped-call]
    client: Redis = sentinel.master_for(url.service)
    return client


async def call(operation: Callable[[], Awaitable[Any]], timeout_s: float = CALL_TIMEOUT_S) -> Any:
    """One operation of a client, its retries included, bounded in time. Raises RedisUnavailable or CommandRefused."""
    task = asyncio.ensure_future(operation())
    task.add_done_callback(retrieve)
    try:
        with translated():
            # Not asyncio.timeout: in Python 3.11 the wait_for inside redis-py can lose the cancellation that it sends.
            await asyncio.wait({task}, timeout=timeout_s)
            if not task.done():
                raise TimeoutError(f"no reply within {timeout_s:g} s")
            return task.result()
    finally:
        task.cancel()


@contextmanager
def translated() -> Iterator[None]:
    """Raises redis-py's errors as RedisUnavailable, or as CommandRefused when repeating the command cannot help."""
    try:
        yield
    except ResponseError as error:
        raise refusal(error) from error
    except (TimeoutError, OSError, RedisError, RedisClusterException, AttributeError) as error:
        # RedisClusterException is no RedisError: no node can be reached. redis-py ends in an AttributeError when another
        # call drops the connection on which this one is sending.
        raise RedisUnavailable(_reason(error)) from error
    except RuntimeError as error:
        # uvloop's error for a connection that was closed while redis-py was using it, after a foreign reply for example.
        if "the handler is closed" not in str(error):
            raise
        raise RedisUnavailable(_reason(error)) from error


def refusal(error: ResponseError) -> PersistenceError:
    """This package's error for one that Redis replied with."""
    # redis-py keeps the error's first word as its code and cuts it off the text, except for words that it does not know.
    if error.status_code == "ERR" or str(error).startswith("WRONGTYPE") or isinstance(error, ClusterCrossSlotError):
        return CommandRefused(_reason(error))
    return RedisUnavailable(_reason(error))


def _reason(error: Exception) -> str:
    """An error's text for the log, without the arguments that Redis repeats of a command that it does not know."""
    return f"{type(error).__name__}: {str(error).partition(', with args beginning with')[0]}"
