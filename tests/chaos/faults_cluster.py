"""Faults that only a cluster can have."""

import asyncio
from collections.abc import Sequence

from gateway.dev.servers.ports import HOST
from gateway.dev.servers.redis import RedisServer
from tests.chaos.faults_failover import covered
from tests.chaos.harm import Harm, dead_s
from tests.chaos.store import PASSWORD, Store, slots_with

MOVED = 300
"""Slots, most of them of partitions."""
AT_ONCE = 100
MIGRATE_MS = 5000


async def shard_dead(harm: Harm) -> None:
    """A master and its replica are away for 20 s: a third of all sessions, and no other, is unavailable."""
    store = harm.site.store
    master = harm.chance.choice(await store.masters())
    harm.window.covers = await covered(store, master)
    # The replicas first, or they would take its place.
    shard = [*await store.replicas_of(master), master]
    for server in shard:
        await asyncio.to_thread(server.kill)
    await asyncio.sleep(dead_s(harm.site.options))
    for server in reversed(shard):
        await asyncio.to_thread(server.start)


async def resharded(harm: Harm) -> None:
    """Some hundred slots of a master go to another one, with all their keys, under load."""
    store = harm.site.store
    source, target = harm.chance.sample(await store.masters(), 2)
    others = [server for server in await store.masters() if server not in (source, target)]
    served = await store.ask(source, "CLUSTER", "SLOTS")
    own = {slot for first, last, node, *_ in served if node[1] == source.port for slot in range(first, last + 1)}
    owned = {partition for partition, port in (await store.owners()).items() if port == source.port}
    for slot in [slot for slot in slots_with(store.keys, owned) if slot in own][:MOVED]:
        await _move(store, slot, source, target, others)


async def _move(store: Store, slot: int, source: RedisServer, target: RedisServer, others: Sequence[RedisServer]) -> None:
    """Moves a slot as redis-cli does: https://redis.io/docs/latest/commands/cluster-setslot/."""
    source_id = (await store.ask(source, "CLUSTER", "MYID")).decode()
    target_id = (await store.ask(target, "CLUSTER", "MYID")).decode()
    await store.ask(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
    await store.ask(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
    whither = (HOST, target.port, "", 0, MIGRATE_MS, "REPLACE", "AUTH", PASSWORD)
    while keys := await store.ask(source, "CLUSTER", "GETKEYSINSLOT", slot, AT_ONCE):
        await store.ask(source, "MIGRATE", *whither, "KEYS", *keys)
    for server in (target, source, *others):
        await store.ask(server, "CLUSTER", "SETSLOT", slot, "NODE", target_id)
