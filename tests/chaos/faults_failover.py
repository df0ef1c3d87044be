"""Faults of masters with replicas: who answers changes, and may not know all that the one before it did.

Before a master is harmed its replicas are seen to be in step: nothing that was answered until then can be lost with it.
"""

import asyncio
from collections.abc import Callable
from contextlib import suppress
from time import monotonic

from gateway.dev.servers.ports import ServerError
from gateway.dev.servers.redis import SENTINEL_NAME, RedisServer
from tests.chaos.harm import Harm
from tests.chaos.store import AWAY, PEER, WATCH, Store
from tests.support.serving import wait_for

CUT_OFF_S = 2.0
PARTITION_S = 13.0
FOLLOWS_S = 2.0
"""How long pods and workers may go on with a master when Sentinels have named another one: they ask each second. What the
old one answers after that is lost by whoever asked it, not by the failover."""
FAILOVER_S = 30.0
POLL_S = 0.05


async def master_killed(harm: Harm) -> None:
    """SIGKILL of a master; when a replica has taken its place, it is started again and follows that one."""
    master = await _choose(harm)
    loss = harm.open_loss(await in_step(harm.site.store, [master]), harm.window.covers)
    await asyncio.to_thread(master.kill)
    await harm.close_loss(loss)
    await _fail_over(harm, master)


async def replicas_cut_off(harm: Harm) -> None:
    """A master's replicas cannot reach it for two seconds, then it is killed: they lack what it has answered since."""
    store, master = harm.site.store, await _choose(harm)
    loss = harm.open_loss(await in_step(store, [master]), harm.window.covers)
    await _cut_off(store, master, PEER)
    await asyncio.sleep(CUT_OFF_S)
    await asyncio.to_thread(master.kill)
    await harm.close_loss(loss)
    await _fail_over(harm, master)


async def failover_planned(harm: Harm) -> None:
    """SENTINEL FAILOVER, or CLUSTER FAILOVER on a replica, while everybody is healthy."""
    store, master = harm.site.store, await _choose(harm)
    if store.topology == "cluster":
        # The master lets nobody write until the replica has everything: nothing may be lost.
        replica = (await store.replicas_of(master))[0]
        await asyncio.to_thread(replica.ask, "CLUSTER", "FAILOVER")
        await _has_failed_over(harm, master)
        return
    loss = harm.open_loss(await in_step(store, [master]))
    await asyncio.to_thread(store.sentinels[0].ask, "SENTINEL", "FAILOVER", SENTINEL_NAME)
    if await _has_failed_over(harm, master):
        await _until_followed(master)
    await harm.close_loss(loss, goes_on=True)


async def partition(harm: Harm) -> None:
    """Sentinels and replicas cannot reach the master for 13 s, pods and workers can; then all reach each other again."""
    store, master = harm.site.store, await _choose(harm)
    began_at = monotonic()
    loss = harm.open_loss(await in_step(store, [master]))
    await _cut_off(store, master, PEER, WATCH)
    if await _has_failed_over(harm, master):
        await _until_followed(master)
    await harm.close_loss(loss, goes_on=True)
    await asyncio.sleep(max(0.0, began_at + PARTITION_S - monotonic()))
    for user in (PEER, WATCH):
        await store.ask(master, "ACL", "SETUSER", user, "on")


async def all_nodes_down(harm: Harm) -> None:
    """SIGKILL of every server of Redis and of every Sentinel; some seconds later all are started again."""
    store = harm.site.store
    harm.window.covers = lambda session_id: True
    loss = harm.open_loss(await in_step(store, await store.masters()))
    everybody = (*store.sentinels, *store.servers)
    await asyncio.gather(*(asyncio.to_thread(server.kill) for server in everybody))
    await harm.close_loss(loss)
    await harm.wait(3, 5)
    await asyncio.to_thread(store.group.start)


async def in_step(store: Store, masters: list[RedisServer]) -> float:
    """Waits until every replica has what its master had a moment ago; which moment, of the monotonic clock."""
    at = monotonic()
    wanted: dict[RedisServer, int] = {}
    for master in masters:
        offset = int((await store.client_of(master).info("replication"))["master_repl_offset"])
        wanted |= dict.fromkeys(await store.replicas_of(master), offset)

    def has_it(replica: RedisServer, offset: int) -> bool:
        return int(replica.facts("INFO", "replication").get("slave_repl_offset", -1)) >= offset

    for replica, offset in wanted.items():
        while not await asyncio.to_thread(has_it, replica, offset):
            if monotonic() > at + FAILOVER_S:
                raise AssertionError(f"the replica on port {replica.port} does not get into step")
            await asyncio.sleep(POLL_S)
    return at


async def _choose(harm: Harm) -> RedisServer:
    """A master; the fault hits the sessions that are on it."""
    store = harm.site.store
    master = harm.chance.choice(await store.masters())
    harm.window.covers = await covered(store, master)
    return master


async def covered(store: Store, master: RedisServer) -> Callable[[str], bool]:
    """Whether a session is on this master now."""
    return store.covers({partition for partition, port in (await store.owners()).items() if port == master.port})


async def _cut_off(store: Store, master: RedisServer, *users: str) -> None:
    """From now on nobody of these can log in at the master, nor goes on with a connection."""
    for user in users:
        await store.ask(master, "ACL", "SETUSER", user, "off")
        await store.ask(master, "CLIENT", "KILL", "USER", user)


async def _has_failed_over(harm: Harm, master: RedisServer) -> bool:
    """Waits until another server has a master's place; whether one has it in time."""
    store = harm.site.store

    async def replaced() -> bool:
        if store.topology == "cluster":
            owners = set((await store.owners(without=master)).values())
            return bool(owners) and master.port not in owners
        named = await asyncio.to_thread(store.named)
        return bool(named) and master.port not in named and store.master is not master

    try:
        await wait_for(replaced, "another server is master", FAILOVER_S)
    except AssertionError:
        harm.ledger.unexpected.append(f"no other server has become master within {FAILOVER_S:g} s")
        return False
    return True


async def _fail_over(harm: Harm, master: RedisServer) -> None:
    await _has_failed_over(harm, master)
    await asyncio.to_thread(master.start)


async def _until_followed(master: RedisServer) -> None:
    """Waits until nobody may be answered by the old master any more: it is a replica, or all have had the time to leave."""
    due_at = monotonic() + FOLLOWS_S
    while monotonic() < due_at:
        with suppress(ServerError, *AWAY):
            if (await asyncio.to_thread(master.facts, "INFO", "replication")).get("role") == "slave":
                return
        await asyncio.sleep(POLL_S)
