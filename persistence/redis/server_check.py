"""Checks at the start of a process that the Redis server is one on which the guarantees hold."""

import re
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

import structlog
from redis.asyncio import RedisCluster

from persistence.errors import UnsuitableRedis
from persistence.model.fields import FORMAT
from persistence.redis.connection import Client, call
from persistence.redis.keys import Keys

log = structlog.get_logger()

CHECK_TIMEOUT_S = 5.0
MINIMUM_REDIS = (7, 0)
MINIMUM_VALKEY = (7, 2)


async def check_server(client: Client, keys: Keys) -> None:
    """Refuses a server on which the guarantees do not hold; warns where they are weaker. Checks every node of a cluster.

    Records format and partition number in `gw:meta` on first use. Raises UnsuitableRedis or RedisUnavailable.
    """
    if isinstance(client, RedisCluster):
        await call(client.initialize, CHECK_TIMEOUT_S)
        for node in client.get_primaries():
            await _check_node(partial(client.execute_command, target_nodes=node))
    else:
        await _check_node(client.execute_command)
    await _check_meta(client, keys)


async def _check_node(execute: Callable[..., Awaitable[Any]]) -> None:
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
