"""What always holds in Redis, checked on a whole one: which keys may live without a TTL; the counter of the outbox."""

from typing import Any

from redis.asyncio import Redis, RedisCluster

from persistence.redis.keys import Keys


async def all_keys(client: Redis | RedisCluster, keys: Keys) -> list[str]:
    """Every key under the prefix, on every node."""
    found = [key async for key in client.scan_iter(match=f"{keys.prefix}:*", count=1000)]
    return sorted(key.decode() for key in found)


async def breaches(client: Redis | RedisCluster, keys: Keys) -> list[str]:
    """What breaks a rule, in words: a key without TTL that should have one, a session that should not, a wrong counter."""
    wrong = []
    for key in await all_keys(client, keys):
        ttl = await client.ttl(key)
        if ":session:" in key:
            values = await client.hmget(key, ["unflushed", "turn"])
            settled = not any(values)
            if settled and ttl == -1:
                wrong.append(f"{key} is all in Postgres, nothing runs on it, and it has no TTL")
            if not settled and ttl != -1:
                wrong.append(f"{key} has a TTL of {ttl} s, unflushed={values[0]!r} turn={values[1]!r}")
        elif ttl == -1 and key not in keys.permanent() and not key.startswith(f"{keys.prefix}:agent:"):
            wrong.append(f"{key} has no TTL and is not on the permanent list")
    return wrong + await miscounts(client, keys)


async def miscounts(client: Redis | RedisCluster, keys: Keys) -> list[str]:
    """The counters that are not the sum of the bytes that the records on their outbox carry, in words."""
    wrong = []
    present = set(await all_keys(client, keys))
    for partition in range(keys.partitions):
        outbox, counter = keys.outbox(partition), keys.outbox_bytes(partition)
        if present.isdisjoint((outbox, counter)):
            continue
        entries: Any = await client.xrange(outbox)
        carried = sum(int(record.get(b"bytes", 0)) for _, record in entries)
        counted = int(await client.get(counter) or 0)
        if counted != carried:
            wrong.append(f"{counter} says {counted}, the records on the outbox carry {carried}")
    return wrong
