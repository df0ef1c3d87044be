"""Checks at the start of a process that the Redis server is one on which the guarantees hold."""

import re
from collections.abc import Awaitable, Callable, Iterable, Iterator
from functools import partial
from typing import Any

import msgspec
import structlog
from redis.asyncio import RedisCluster

from persistence.errors import CommandRefused, RedisUnavailable, UnsuitableRedis
from persistence.model.fields import FORMAT
from persistence.redis.connection import Client, call
from persistence.redis.keys import Keys

log = structlog.get_logger()

CHECK_TIMEOUT_S = 5.0
MINIMUM_REDIS = (7, 0)
MINIMUM_VALKEY = (7, 2)
MAX_LAG_S = 1
"""A master that has heard nothing of its replicas for longer should take no writes. Redis measures it in whole seconds."""


class ServerFacts(msgspec.Struct, frozen=True):
    """What matters of a server. `name` is its address as it was asked; `server` the section of that name of INFO;
    `min_replicas` and `max_lag_s` are None where it does not tell its configuration, as managed ones do not."""

    name: str
    server: dict[str, Any]
    policy: str
    append_only: bool
    replicas: int
    min_replicas: int | None = None
    max_lag_s: int | None = None


class Weakness(msgspec.Struct, frozen=True):
    """Where the guarantees are weaker on a server. `event` is its name in the log."""

    event: str
    facts: dict[str, int]
    consequence: str
    remedy: str


async def check_server(client: Client, keys: Keys, *, replicas: int = 0) -> None:
    """Refuses a server on which the guarantees do not hold; warns where they are weaker. Checks every master of a cluster.
    `replicas` is how many are to have a turn before it is answered.

    Records format and partition number in `gw:meta` on first use. Raises UnsuitableRedis or RedisUnavailable.
    """
    for facts in await read_servers(client):
        refuse_unsuitable(facts)
        for weakness in weaknesses(facts, replicas):
            log.warning(weakness.event, **weakness.facts, consequence=weakness.consequence, remedy=weakness.remedy)
    try:
        await check_meta(client, keys)
    except RedisUnavailable as error:
        if not isinstance(client, RedisCluster):
            raise
        # It lies on a shard that is away: the pods that were there before have recorded it.
        log.warning("redis.meta_unreachable", error=str(error))


async def read_servers(client: Client) -> list[ServerFacts]:
    """The facts of every master; of a cluster of those that can be reached, for one dead shard keeps no pod from starting.
    Raises RedisUnavailable or CommandRefused."""
    if not isinstance(client, RedisCluster):
        return [await _read_node("Redis", client.execute_command)]
    await call(client.initialize, CHECK_TIMEOUT_S)
    found, failures = [], []
    for node in client.get_primaries():
        try:
            found.append(await _read_node(f"Redis {node.name}", partial(client.execute_command, target_nodes=node)))
        except RedisUnavailable as error:
            failures.append(error)
            log.warning("redis.server_unreachable", server=node.name, error=str(error))
    if failures and not found:
        raise failures[0]
    return found


async def _read_node(name: str, execute: Callable[..., Awaitable[Any]]) -> ServerFacts:
    facts = ServerFacts(
        name,
        server=await _info(execute, "server"),
        policy=str((await _info(execute, "memory")).get("maxmemory_policy", "")),
        append_only=bool(int((await _info(execute, "persistence")).get("aof_enabled", 0))),
        replicas=int((await _info(execute, "replication")).get("connected_slaves", 0)),
    )
    try:
        told = await call(lambda: execute("CONFIG", "GET", "min-replicas-*"), CHECK_TIMEOUT_S)
    except CommandRefused:
        return facts
    found = {_text(name): int(_text(value)) for name, value in _pairs_of(told)}
    return msgspec.structs.replace(
        facts, min_replicas=found.get("min-replicas-to-write"), max_lag_s=found.get("min-replicas-max-lag")
    )


def refuse_unsuitable(facts: ServerFacts) -> None:
    """Raises UnsuitableRedis where the guarantees do not hold."""
    check_version(facts.server)
    policy = facts.policy
    if policy.startswith("allkeys"):
        raise UnsuitableRedis(
            f"maxmemory-policy is {policy}: Redis could evict answers that are not in Postgres yet; "
            "set it to volatile-lru (or volatile-lfu, volatile-ttl, noeviction)"
        )


def weaknesses(facts: ServerFacts, replicas: int) -> Iterator[Weakness]:
    """Where the guarantees are weaker on a server, if `replicas` of its own are to have what is answered."""
    if not facts.append_only:
        yield Weakness(
            "redis.aof_off",
            {},
            consequence="answers that are not in Postgres yet are lost when Redis stops",
            remedy="CONFIG SET appendonly yes",
        )
    if facts.replicas < replicas:
        yield Weakness(
            "redis.too_few_replicas",
            {"replicas": facts.replicas, "wanted": replicas},
            consequence="turns are not answered",
            remedy="add replicas, or lower GATEWAY_REDIS_REPLICAS",
        )
    least, lag_s = facts.min_replicas, facts.max_lag_s
    if facts.replicas and least is not None and lag_s is not None and (least < 1 or lag_s > MAX_LAG_S):
        yield Weakness(
            "redis.writes_alone",
            {"min_replicas_to_write": least, "min_replicas_max_lag": lag_s},
            consequence="a master that is cut off from its replicas goes on, and what it answers is lost with it",
            remedy=f"CONFIG SET min-replicas-to-write 1 min-replicas-max-lag {MAX_LAG_S}",
        )


def _pairs_of(reply: Any) -> Iterable[tuple[Any, Any]]:
    """Names and values of a reply, which a cluster's client gives by node."""
    if isinstance(reply, dict) and all(isinstance(value, (dict, list)) for value in reply.values()):
        reply = next(iter(reply.values()), {})
    return reply.items() if isinstance(reply, dict) else zip(reply[::2], reply[1::2], strict=True)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


async def _info(execute: Callable[..., Awaitable[Any]], section: str) -> dict[str, Any]:
    """A section of INFO. The client of a cluster answers with one by node."""
    reply: dict[str, Any] = await call(lambda: execute("INFO", section), CHECK_TIMEOUT_S)
    if reply and all(isinstance(value, dict) for value in reply.values()):
        reply = next(iter(reply.values()))
    return reply


def check_version(info: dict[str, Any]) -> None:
    """Checks the section `server` of INFO. Raises UnsuitableRedis when the server is older than what works."""
    valkey = info.get("valkey_version")
    name, text, minimum = (
        ("Valkey", valkey, MINIMUM_VALKEY) if valkey else ("Redis", info.get("redis_version", "0"), MINIMUM_REDIS)
    )
    found = tuple(int(number) for number in re.findall(r"\d+", str(text))[:2])
    if found < minimum:
        raise UnsuitableRedis(f"{name} {text} is too old: Redis 7.0 or Valkey 7.2 is the oldest that works")


async def check_meta(client: Client, keys: Keys, *, record: bool = True) -> None:
    """Compares partition number and format with those that are recorded; unless `record`, none is written where there are
    none. Raises UnsuitableRedis or RedisUnavailable."""
    for field, ours in (("partitions", keys.partitions), ("format", FORMAT)):
        stored = await call(partial(client.execute_command, "HGET", keys.meta, field))
        if stored is None:
            if not record:
                continue
            # Written only where it is missing: a process can start while Redis is full and refuses writes.
            await call(partial(client.execute_command, "HSETNX", keys.meta, field, ours))
            stored = await call(partial(client.execute_command, "HGET", keys.meta, field))
        if stored != str(ours).encode():
            raise UnsuitableRedis(
                f"{keys.meta} says {field} = {stored.decode(errors='replace')}, this process is set to {ours}"
                + ("; set GATEWAY_PARTITIONS to what is stored" if field == "partitions" else "")
            )
