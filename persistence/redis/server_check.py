"""Checks at the start of a process that the Redis server is one on which the guarantees hold."""

import re
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any

import structlog
from redis.asyncio import RedisCluster

from persistence.errors import CommandRefused, UnsuitableRedis
from persistence.model.fields import FORMAT
from persistence.redis.connection import Client, call
from persistence.redis.keys import Keys

log = structlog.get_logger()

CHECK_TIMEOUT_S = 5.0
MINIMUM_REDIS = (7, 0)
MINIMUM_VALKEY = (7, 2)
MAX_LAG_S = 1
"""A master that has heard nothing of its replicas for longer should take no writes. Redis measures it in whole seconds."""


async def check_server(client: Client, keys: Keys, *, replicas: int = 0) -> None:
    """Refuses a server on which the guarantees do not hold; warns where they are weaker. Checks every master of a cluster.
    `replicas` is how many are to have a turn before it is answered.

    Records format and partition number in `gw:meta` on first use. Raises UnsuitableRedis or RedisUnavailable.
    """
    if isinstance(client, RedisCluster):
        await call(client.initialize, CHECK_TIMEOUT_S)
        for node in client.get_primaries():
            await _check_node(partial(client.execute_command, target_nodes=node), replicas)
    else:
        await _check_node(client.execute_command, replicas)
    await _check_meta(client, keys)


async def _check_node(execute: Callable[..., Awaitable[Any]], replicas: int) -> None:
    check_version(await _info(execute, "server"))
    policy = str((await _info(execute, "memory")).get("maxmemory_policy", ""))
    if policy.startswith("allkeys"):
        raise UnsuitableRedis(
            f"maxmemory-policy is {policy}: Redis could evict answers that are not in Postgres yet; "
            "set it to volatile-lru (or volatile-lfu, volatile-ttl, noeviction)"
        )
    if not int((await _info(execute, "persistence")).get("aof_enabled", 0)):
        log.warning(
            "redis.aof_off",
            consequence="answers that are not in Postgres yet are lost when Redis stops",
            remedy="CONFIG SET appendonly yes",
        )
    await _check_replication(execute, replicas)


async def _check_replication(execute: Callable[..., Awaitable[Any]], replicas: int) -> None:
    """Warns of a master that goes on alone when it is cut off from its replicas: what it answers then is lost with it."""
    connected = int((await _info(execute, "replication")).get("connected_slaves", 0))
    if connected < replicas:
        log.warning(
            "redis.too_few_replicas",
            replicas=connected,
            wanted=replicas,
            consequence="turns are not answered",
            remedy="add replicas, or lower GATEWAY_REDIS_REPLICAS",
        )
    if not connected:
        return
    try:
        told = await call(lambda: execute("CONFIG", "GET", "min-replicas-*"), CHECK_TIMEOUT_S)
    except CommandRefused:
        # Managed servers tell nothing of their configuration.
        return
    found = {_text(name): int(_text(value)) for name, value in _pairs_of(told)}
    least, lag_s = found.get("min-replicas-to-write", 0), found.get("min-replicas-max-lag", 10)
    if least < 1 or lag_s > MAX_LAG_S:
        log.warning(
            "redis.writes_alone",
            min_replicas_to_write=least,
            min_replicas_max_lag=lag_s,
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


async def _check_meta(client: Client, keys: Keys) -> None:
    for field, ours in (("partitions", keys.partitions), ("format", FORMAT)):
        stored = await call(partial(client.execute_command, "HGET", keys.meta, field))
        if stored is None:
            # Written only where it is missing: a process can start while Redis is full and refuses writes.
            await call(partial(client.execute_command, "HSETNX", keys.meta, field, ours))
            stored = await call(partial(client.execute_command, "HGET", keys.meta, field))
        if stored != str(ours).encode():
            raise UnsuitableRedis(
                f"{keys.meta} says {field} = {stored.decode(errors='replace')}, this process is set to {ours}"
                + ("; set GATEWAY_PARTITIONS to what is stored" if field == "partitions" else "")
            )
