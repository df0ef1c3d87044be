"""Connects to Redis by URL and checks that the server is one the promises hold on.

One client class per way of running Redis: single (`redis://`, `rediss://`), Sentinel (`redis+sentinel://`,
`rediss+sentinel://`) and Cluster (`redis+cluster://`, `rediss+cluster://`). Everything here has explicit timeouts and
few retries: every write script checks an id, so repeating one is safe, and a visitor gets an answer within 2 s.
"""

import asyncio
import inspect
import re
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import structlog
from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import ExponentialWithJitterBackoff
from redis.exceptions import ClusterCrossSlotError, RedisError, ResponseError

from persistence.errors import CommandRefused, PersistenceError, RedisUnavailable, UnsuitableRedis
from persistence.model.fields import FORMAT
from persistence.redis.keys import Keys

log = structlog.get_logger()

Client = Redis | RedisCluster
Result = TypeVar("Result")

CONNECT_TIMEOUT_S = 0.5
REPLY_TIMEOUT_S = 1.0
RETRIES = 2
CLUSTER_PARTITIONS = 256
URL_OPTIONS = frozenset(
    ("ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "client_name", "db")
)
"""What a URL may say behind its question mark: nothing that would undo what the promises need of a connection."""
SENTINEL_OPTIONS = frozenset(("sentinel_username", "sentinel_password"))
MINIMUM_REDIS = (7, 0)
MINIMUM_VALKEY = (7, 2)


def _options() -> dict[str, Any]:
    return {
        # With RESP3 the pool of redis-py 8.1 hands out connections that still hold an unread reply; with RESP2 it looks.
        "protocol": 2,
        "socket_timeout": REPLY_TIMEOUT_S,
        "socket_connect_timeout": CONNECT_TIMEOUT_S,
        "socket_keepalive": True,
        "health_check_interval": 0,
        "decode_responses": False,
        # No CLIENT SETINFO when connecting: redis-py ignores what is answered to it, were it a reply to something else.
        "driver_info": None,
        "retry": Retry(ExponentialWithJitterBackoff(base=0.02, cap=0.2), RETRIES),
    }


def is_cluster(url: str) -> bool:
    """Whether the URL names a Redis Cluster."""
    return "+cluster" in urlsplit(url).scheme


def default_partitions(url: str) -> int:
    """1 on a single Redis or Sentinel, 256 on Redis Cluster."""
    return CLUSTER_PARTITIONS if is_cluster(url) else 1


class UnusableUrl(ValueError):
    """A URL of no Redis; the message quotes nothing of it but the names of options, for it holds a password."""


def connect(url: str) -> Client:
    """A client for `url`; nothing is sent yet.

    `redis+sentinel://[user:password@]host[:26379][,host:port...]/<service>[/<db>][?sentinel_username=&sentinel_password=]`
    and `redis+cluster://[user:password@]host[:port][,host:port...]` are this project's spellings; the plain schemes are
    redis-py's. Raises UnusableUrl, or another ValueError, on anything else.
    """
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    if scheme not in ("redis", "rediss"):
        raise UnusableUrl(
            "the scheme is not one of redis, rediss, redis+sentinel, rediss+sentinel, redis+cluster, rediss+cluster"
        )
    query = parse_qs(parts.query)
    allowed = SENTINEL_OPTIONS if kind == "sentinel" else URL_OPTIONS
    for name in query:
        if name not in allowed:
            raise UnusableUrl(f"option {name} is not one of {', '.join(sorted(allowed))}")
    if not kind:
        return Redis.from_url(url, max_connections=1024, **_options())
    credentials, _, hosts = parts.netloc.rpartition("@")
    username, _, password = credentials.partition(":")
    options = _options()
    if credentials:
        options |= {"username": unquote(username) or None, "password": unquote(password) or None}
    if scheme == "rediss":
        options["ssl"] = True
    if kind == "cluster":
        if parts.path.strip("/"):
            raise UnusableUrl("a cluster has no databases: the URL ends after the hosts")
        nodes = [ClusterNode(host, port) for host, port in _hosts(hosts, 6379)]
        retry = options.pop("retry")
        return RedisCluster(startup_nodes=nodes, max_connections=1024, retry=retry, **options)
    if kind == "sentinel":
        service, _, db = parts.path.strip("/").partition("/")
        if not service:
            raise UnusableUrl("a Sentinel URL names the service in its path: redis+sentinel://host:26379/<service>")
        sentinel_options = {name: options[name] for name in ("protocol", "socket_timeout", "socket_connect_timeout")}
        sentinel_options |= {"ssl": True} if scheme == "rediss" else {}
        for name in ("username", "password"):
            if given := query.get(f"sentinel_{name}"):
                sentinel_options[name] = given[0]
        sentinel = Sentinel(_hosts(hosts, 26379), sentinel_kwargs=sentinel_options, **options, db=int(db or 0))  # type: ignore[no-untyped-call]
        client: Redis = sentinel.master_for(service)
        return client
    raise UnusableUrl("the scheme is redis or rediss, alone or with +sentinel or +cluster")


def _hosts(netloc: str, default_port: int) -> list[tuple[str, int]]:
    found = []
    for part in netloc.split(","):
        split = urlsplit(f"//{part}")
        if not split.hostname:
            raise UnusableUrl("a host is missing")
        found.append((split.hostname, split.port or default_port))
    return found


async def call(operation: Callable[[], Awaitable[Any]], timeout_s: float = 1.8) -> Any:
    """One Redis operation, its retries included, bounded in time.

    Raises RedisUnavailable, or CommandRefused when Redis is there and will never do it.
    """
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
    """Raises what redis-py raises as RedisUnavailable, or as CommandRefused when Redis is there and will never do it."""
    try:
        yield
    except ResponseError as error:
        raise refusal(error) from error
    except (TimeoutError, OSError, RedisError, AttributeError) as error:
        # AttributeError is what redis-py ends in when another call drops the connection on which this one is sending.
        raise RedisUnavailable(_reason(error)) from error
    except RuntimeError as error:
        # How uvloop says that a connection was closed (because of a foreign reply, say) while redis-py was using it.
        if "the handler is closed" not in str(error):
            raise
        raise RedisUnavailable(_reason(error)) from error


def refusal(error: ResponseError) -> PersistenceError:
    """What an error that Redis replied with is to callers."""
    # redis-py cuts the first word off and keeps it as the code, but for words that it does not know.
    if error.status_code == "ERR" or str(error).startswith("WRONGTYPE") or isinstance(error, ClusterCrossSlotError):
        return CommandRefused(_reason(error))
    return RedisUnavailable(_reason(error))


def _reason(error: Exception) -> str:
    """An error in words that can be logged: of a command that it does not know, Redis repeats the arguments."""
    return f"{type(error).__name__}: {str(error).partition(', with args beginning with')[0]}"


def retrieve(task: "asyncio.Future[Any]") -> None:
    """Takes note of an error that nobody may be waiting for any more: a task's callback."""
    if not task.cancelled():
        task.exception()


async def gather_bounded(work: Iterable[Coroutine[Any, Any, Result]], at_once: int = 32) -> list[Result]:
    """Runs coroutines side by side, a bounded number at a time; results in order. All end before an error is raised."""
    free = asyncio.Semaphore(at_once)
    coroutines = list(work)

    async def one(coroutine: Coroutine[Any, Any, Result]) -> Result:
        async with free:
            return await coroutine

    try:
        outcomes = await asyncio.gather(*map(one, coroutines), return_exceptions=True)
    finally:
        for coroutine in coroutines:
            # Those that had not begun when this was cancelled never will.
            if inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED:
                coroutine.close()
    results = []
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
        results.append(outcome)
    return results


async def drop_connections(client: Client) -> None:
    """Closes every pooled connection, in use or idle: what is unread on them is never read."""
    if isinstance(client, RedisCluster):
        await asyncio.gather(*(node.disconnect() for node in client.get_nodes()), return_exceptions=True)
    else:
        await client.connection_pool.disconnect(inuse_connections=True)


async def check_server(client: Client, keys: Keys) -> None:
    """Refuses a server on which the promises would not hold; warns where they are weaker.

    Records format and partition number in `gw:meta` on first use. Raises UnsuitableRedis or RedisUnavailable.
    """
    if isinstance(client, RedisCluster):
        await call(client.initialize, 5)
        for node in client.get_primaries():
            await _check_node(partial(client.execute_command, target_nodes=node))
    else:
        await _check_node(client.execute_command)
    await _check_meta(client, keys)


async def _check_node(execute: Callable[..., Awaitable[Any]]) -> None:
    server = await call(lambda: execute("INFO", "server"), 5)
    _check_version(server if isinstance(server, dict) else next(iter(server.values())))
    memory = _settings(await call(lambda: execute("INFO", "memory"), 5))
    policy = str(memory.get("maxmemory_policy", ""))
    if policy.startswith("allkeys"):
        raise UnsuitableRedis(
            f"maxmemory-policy is {policy}: Redis could evict answers that are not in Postgres yet; "
            "set it to volatile-lru (or volatile-lfu, volatile-ttl, noeviction)"
        )
    persistence = _settings(await call(lambda: execute("INFO", "persistence"), 5))
    if not int(persistence.get("aof_enabled", 0)):
        log.warning(
            "redis.aof_off",
            consequence="answers that are not in Postgres yet are lost when Redis stops",
            remedy="CONFIG SET appendonly yes",
        )


def _settings(reply: Any) -> dict[str, Any]:
    if isinstance(reply, dict) and reply and all(isinstance(value, dict) for value in reply.values()):
        reply = next(iter(reply.values()))
    return dict(reply)


def _check_version(info: dict[str, Any]) -> None:
    valkey = info.get("valkey_version")
    name, text, minimum = (
        ("Valkey", valkey, MINIMUM_VALKEY) if valkey else ("Redis", info.get("redis_version", "0"), MINIMUM_REDIS)
    )
    found = tuple(int(number) for number in re.findall(r"\d+", str(text))[:2])
    if found < minimum:
        raise UnsuitableRedis(f"{name} {text} is too old: Redis 7.0 or Valkey 7.2 is the oldest that works")


async def _check_meta(client: Client, keys: Keys) -> None:
    for field, ours in (("partitions", keys.partitions), ("format", FORMAT)):
        stored = await call(partial(client.execute_command, "HGET", keys.meta, field))
        if stored is None:
            # Only now: a process starts also while Redis is full and takes no writes.
            await call(partial(client.execute_command, "HSETNX", keys.meta, field, ours))
            stored = await call(partial(client.execute_command, "HGET", keys.meta, field))
        if stored != str(ours).encode():
            raise UnsuitableRedis(
                f"{keys.meta} says {field} = {stored.decode(errors='replace')}, this process is set to {ours}"
                + ("; set GATEWAY_PARTITIONS to what is stored" if field == "partitions" else "")
            )
