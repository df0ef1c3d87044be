"""The one rule of the hot store, checked on a whole Redis: which keys may live without a TTL."""

from redis.asyncio import Redis, RedisCluster

from persistence.keys import Keys


async def all_keys(client: Redis | RedisCluster, keys: Keys) -> list[str]:
    """Every key under the prefix, on every node."""
    found = [key async for key in client.scan_iter(match=f"{keys.prefix}:*", count=1000)]
    return sorted(key.decode() for key in found)


async def breaches(client: Redis | RedisCluster, keys: Keys) -> list[str]:
    """What breaks the rule, in words: a key without TTL that should have one, or a session that should not."""
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
    return wrong
