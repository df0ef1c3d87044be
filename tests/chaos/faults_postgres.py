"""Faults of Postgres."""

import asyncio

import asyncpg

from tests.chaos.harm import Harm, lock_s, outage_s


async def postgres_killed(harm: Harm) -> None:
    """SIGKILL of PostgreSQL and of its sessions; it is started again."""
    await asyncio.to_thread(harm.site.postgres.kill)
    await harm.wait(0, 2)
    await asyncio.to_thread(harm.site.postgres.start)


async def postgres_down(harm: Harm) -> None:
    """PostgreSQL is away for a fifth of the run, two minutes at most."""
    await asyncio.to_thread(harm.site.postgres.stop)
    await asyncio.sleep(outage_s(harm.site.options))
    await asyncio.to_thread(harm.site.postgres.start)


async def sessions_locked(harm: Harm) -> None:
    """Somebody holds an exclusive lock on agent_sessions for a fifth of the run, a minute at most."""
    connection = await asyncpg.connect(harm.site.postgres.url)
    try:
        async with connection.transaction():
            await connection.execute("LOCK TABLE agent_sessions IN ACCESS EXCLUSIVE MODE")
            await asyncio.sleep(lock_s(harm.site.options))
    finally:
        await connection.close()


async def postgres_read_only(harm: Harm) -> None:
    """PostgreSQL takes no writes (SQLSTATE 25006), on connections that are open already too, and then does again."""
    await _set_read_only(harm, "on")
    await harm.wait(5, 8)
    await _set_read_only(harm, "off")


async def _set_read_only(harm: Harm, value: str) -> None:
    connection = await asyncpg.connect(harm.site.postgres.url)
    try:
        await connection.execute(f"ALTER SYSTEM SET default_transaction_read_only = {value}")
        await connection.execute("SELECT pg_reload_conf()")
    finally:
        await connection.close()
