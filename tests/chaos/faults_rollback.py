"""Faults after which a single Redis has forgotten: it is started from older data than it had."""

import asyncio
import shutil
from time import monotonic

from redis.asyncio import Redis

from tests.chaos.harm import Harm
from tests.chaos.server import ChaosServer

GOES_ON_S = (6.0, 9.0)
"""How long everything goes on behind the copy: long enough for turns, ends and erasures that Postgres gets to know of."""
UNSYNCED_S = (1.0, 2.0)
"""How much a power cut takes with `everysec`: Redis begins to sync once a second, and may take another for it."""


async def rollback(harm: Harm) -> None:
    """SIGKILL of Redis; it is started from a copy of its data that is some seconds old, as after a restored snapshot."""
    server, client = await _keeping_files(harm)
    loss = harm.open_loss(monotonic())
    copy = server.directory / "copy"
    await asyncio.to_thread(shutil.copytree, server.append_only_files, copy)
    await harm.wait(*GOES_ON_S)
    await asyncio.to_thread(server.kill)
    await harm.close_loss(loss)
    shutil.rmtree(server.append_only_files)
    copy.rename(server.append_only_files)
    await _start(harm, server, client)


async def power_cut(harm: Harm) -> None:
    """SIGKILL of a Redis with appendfsync everysec, and its append-only file is cut back to what had been synced."""
    server, client = await _keeping_files(harm)
    await client.config_set("appendfsync", "everysec")
    await harm.wait(2, 3)
    # What is answered from here on is not in the part of the file that is kept.
    loss = harm.open_loss(monotonic())
    file = server.newest_commands()
    synced_bytes = file.stat().st_size
    await harm.wait(*UNSYNCED_S)
    await asyncio.to_thread(server.kill)
    await harm.close_loss(loss)
    with file.open("r+b") as kept:
        # It may end within a command: Redis itself drops that (aof-load-truncated).
        kept.truncate(synced_bytes)
    await _start(harm, server, client)


async def _keeping_files(harm: Harm) -> tuple[ChaosServer, Redis]:
    """The server, which does not rewrite its append-only file meanwhile: commands stay where they are."""
    server = harm.site.store.master
    assert isinstance(server, ChaosServer), "of the single topology only"
    client = harm.site.store.client_of(server)
    await client.config_set("auto-aof-rewrite-percentage", 0)
    while (await client.info("persistence"))["aof_rewrite_in_progress"]:
        await asyncio.sleep(0.05)
    return server, client


async def _start(harm: Harm, server: ChaosServer, client: Redis) -> None:
    # Its configuration is that of its file again.
    await asyncio.to_thread(server.start)
    await client.connection_pool.disconnect()
