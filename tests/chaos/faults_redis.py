"""Faults of Redis that are the same on every server, or that only a single one can have, and after which it has forgotten
nothing."""

import asyncio
from time import monotonic
from typing import Any

from redis.asyncio import Redis

from tests.chaos.harm import Harm
from tests.chaos.ledger import Conversation
from tests.chaos.server import ChaosServer
from tests.chaos.site import AGENTS

HELD_BACK_S = 2.0
BACK_S = 600
"""How far the clock is set back."""


async def redis_killed(harm: Harm) -> None:
    """SIGKILL of Redis; it is started again and reads its append-only file."""
    server = harm.site.store.master
    # What the disk has not taken yet may be held back in the process for up to two seconds (redis.conf, appendfsync).
    loses = harm.site.options.appendfsync != "always"
    loss = harm.open_loss(monotonic() - HELD_BACK_S) if loses else None
    await asyncio.to_thread(server.kill)
    if loss is not None:
        await harm.close_loss(loss)
    await harm.wait(0, 2)
    await asyncio.to_thread(server.start)


async def redis_restarted(harm: Harm) -> None:
    """Redis is told to stop, and started again."""
    await asyncio.to_thread(harm.site.store.master.stop)
    await asyncio.to_thread(harm.site.store.master.start)


async def scripts_flushed(harm: Harm) -> None:
    """SCRIPT FLUSH, several times."""
    for _ in range(10):
        await harm.site.store.everywhere("SCRIPT", "FLUSH")
        await asyncio.sleep(0.1)


async def redis_full_evicting(harm: Harm) -> None:
    """Redis is at its memory limit and may evict what Postgres has (volatile-lru)."""
    await _full(harm, harm.site.eviction)


async def redis_full_refusing(harm: Harm) -> None:
    """Redis is at its memory limit and may evict nothing (noeviction)."""
    await _full(harm, "noeviction")


async def _full(harm: Harm, policy: str) -> None:
    store = harm.site.store
    clients = [store.client_of(server) for server in await store.masters()]
    before = [await _turned_out(client) for client in clients]
    for client in clients:
        await client.config_set("maxmemory-policy", policy)
        memory = await client.info("memory")
        await client.config_set("maxmemory", int(memory["used_memory"] * harm.site.options.memory_share))
    await harm.wait(3, 5)
    if [await _turned_out(client) for client in clients] == before:
        harm.ledger.unexpected.append(f"Redis was not full: with {policy} it has evicted and refused nothing")
    for client in clients:
        await client.config_set("maxmemory", 0)
        await client.config_set("maxmemory-policy", harm.site.eviction)


async def _turned_out(client: Redis) -> int:
    """How many keys Redis has evicted and how many commands it has refused for want of memory."""
    stats: Any = await client.info("everything")
    return int(stats["evicted_keys"]) + int(stats.get("errorstat_OOM", {}).get("count", 0))


async def expiry_of_a_second(harm: Harm) -> None:
    """All sessions leave Redis a second after their last turn, if they may."""
    await harm.site.put_agent("usual", 1)
    await harm.wait(6, 9)
    await harm.site.put_agent("usual", AGENTS["usual"])


DAMAGE = """
local key = KEYS[1]
local held = redis.call('HMGET', key, 'turn', 'unflushed', 'turns')
if held[1] ~= '' or held[2] ~= '' or not held[3] then return false end
redis.call('HSET', key, 'turns', 'many')
return held[3]
"""


async def field_damaged(harm: Harm) -> None:
    """A field of a session in Redis is unreadable until it is noticed, then as it was: damage is not absence."""
    client, keys = harm.site.store.client, harm.site.store.keys
    for _ in range(200):
        open_ones = [one for one in harm.ledger.conversations if one.agent == "usual" and not one.over and one.answered()]
        if not open_ones:
            await asyncio.sleep(0.1)
            continue
        conversation = harm.chance.choice(open_ones)
        key = keys.session(conversation.session_id)
        was = await client.eval(DAMAGE, 1, key)
        if was is None:
            await asyncio.sleep(0.02)
            continue
        conversation.damaged = True
        harm.window.victims.add(conversation.session_id)
        noticed = await _is_asked_for(conversation)
        if await client.exists(key):
            await client.hset(key, "turns", was)
        # The last answers about it come in; whatever says so later is a breach.
        await asyncio.sleep(1)
        conversation.damaged = False
        if noticed:
            return


async def _is_asked_for(conversation: Conversation) -> bool:
    """Waits until a message of the session was answered or refused; whether one was, within three seconds."""
    began_at = monotonic()
    while monotonic() - began_at < 3:
        if conversation.heard_since(began_at):
            return True
        await asyncio.sleep(0.05)
    return False


DISK_FULL_S = 5.0
LEFT_BYTES = 2000


async def redis_disk_full(harm: Harm) -> None:
    """The disk of Redis is full: it cannot write its append-only file, and refuses writes until there is room again."""
    server, client = _single(harm), harm.site.store.client_of(harm.site.store.master)
    # With `always` Redis would end itself: that is `redis-killed`, until there is room.
    await client.config_set("appendfsync", "everysec")
    refused = await _refused(client)
    server.fill_disk(LEFT_BYTES)
    try:
        await asyncio.sleep(DISK_FULL_S)
        if await _refused(client) == refused:
            harm.ledger.unexpected.append("the disk of Redis was not full: it has refused nothing")
    finally:
        server.empty_disk()
    while (await client.info("persistence"))["aof_last_write_status"] != "ok":
        await asyncio.sleep(0.05)
    await client.config_set("appendfsync", harm.site.options.appendfsync)


async def _refused(client: Redis) -> int:
    """How many commands Redis has refused for want of a disk."""
    stats: Any = await client.info("errorstats")
    return int(stats.get("errorstat_MISCONF", {}).get("count", 0))


async def clock_set_back(harm: Harm) -> None:
    """The clock of Redis is set back by ten minutes while it runs, and goes on from there."""
    server, client = _single(harm), harm.site.store.client_of(harm.site.store.master)
    before_s, _ = await client.time()
    server.clock_s -= BACK_S
    while (await client.time())[0] > before_s:
        await asyncio.sleep(0.05)
    await harm.wait(4, 6)


def _single(harm: Harm) -> ChaosServer:
    server = harm.site.store.master
    assert isinstance(server, ChaosServer), "of the single topology only"
    return server
