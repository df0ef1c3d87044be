"""The checkup: what an operator should know of both stores, one finding a line, each with its remedy.

Called by `gateway doctor`. It changes nothing, but for the epoch that anybody begins who meets a new server first.
"""

from collections.abc import AsyncIterator, Iterator
from time import time
from typing import Literal

import msgspec

from persistence.errors import CommandRefused, PostgresUnavailable, RedisUnavailable, UnsuitableRedis
from persistence.postgres.postgres import Postgres
from persistence.redis.connection import Client
from persistence.redis.epochs import Epoch, Epochs
from persistence.redis.keys import Keys
from persistence.redis.outbox import Outbox
from persistence.redis.scripts import Scripts
from persistence.redis.server_check import (
    ServerFacts,
    check_meta,
    read_servers,
    refuse_unsuitable,
    weaknesses,
)

LAG_S = 60
"""A worker writes a record within a second; one that is older waits for something."""

Level = Literal["ok", "weak", "wrong"]


class Finding(msgspec.Struct, frozen=True):
    """What a check has found: `ok`; `weak`, which works and promises less; `wrong`, which is to be mended. `about` names the
    subject, `remedy` is empty where nothing is to be done."""

    level: Level
    about: str
    text: str
    remedy: str = ""


async def check_redis(client: Client, keys: Keys, replicas: int) -> AsyncIterator[Finding]:
    """Whether Redis can be reached and is suitable, and where it promises less; `replicas` as in GATEWAY_REDIS_REPLICAS.

    The first finding is ok if, and only if, Redis can be used.
    """
    try:
        servers = await read_servers(client)
        for facts in servers:
            refuse_unsuitable(facts)
        await check_meta(client, keys, record=False)
    except UnsuitableRedis as error:
        yield Finding("wrong", "Redis", str(error), "change what the sentence names; pods and workers refuse to start on it")
        return
    except (RedisUnavailable, CommandRefused) as error:
        yield Finding("wrong", "Redis", f"cannot be used: {error}", "start it, or set GATEWAY_REDIS_URL to where it is")
        return
    for facts in servers:
        yield Finding("ok", facts.name, _described(facts, replicas))
        for weakness in weaknesses(facts, replicas):
            level: Level = "wrong" if weakness.event == "redis.too_few_replicas" else "weak"
            told = ", ".join(f"{name} = {value}" for name, value in weakness.facts.items())
            text = f"{told}: {weakness.consequence}" if told else weakness.consequence
            yield Finding(level, facts.name, text, weakness.remedy)


def _described(facts: ServerFacts, replicas: int) -> str:
    version = facts.server.get("valkey_version") or facts.server.get("redis_version", "of unknown version")
    least = "unknown" if facts.min_replicas is None else facts.min_replicas
    lag = "unknown" if facts.max_lag_s is None else f"{facts.max_lag_s} s"
    return (
        f"version {version}, {facts.policy}, append-only file {'on' if facts.append_only else 'off'}, "
        f"replicas {facts.replicas} (GATEWAY_REDIS_REPLICAS {replicas}, min-replicas-to-write {least}, "
        f"min-replicas-max-lag {lag})"
    )


async def check_epochs(epochs: Epochs, scripts: Scripts, partitions: int) -> AsyncIterator[Finding]:
    """What Redis has forgotten, a line for each partition that has something to tell."""
    found = await epochs.read_all(scripts)
    if len(found) < partitions:
        missing = partitions - len(found)
        yield Finding("wrong", "partitions", f"{missing} of {partitions} do not answer", "bring their Redis server back")
    told = [finding for epoch in found for finding in _told(epoch)]
    for finding in told:
        yield finding
    if found and not told:
        yield Finding("ok", "epochs", "nothing that Redis has forgotten is known of")


def _told(epoch: Epoch) -> Iterator[Finding]:
    if not (epoch.epoch > 1 or epoch.lost or epoch.stored_behind or epoch.erased_again or epoch.vouched):
        return
    text = (
        f"epoch {epoch.epoch} since {epoch.settled_at}; "
        f"turns: {epoch.lost} lost at most, {epoch.stored_behind} stored behind; "
        f"sessions: {epoch.erased_again} erased again, {epoch.vouched} not compared"
    )
    about = f"partition {epoch.partition}"
    if epoch.vouched:
        yield Finding("wrong", about, text, "bring Postgres back and have a worker run: it has those sessions compared")
    elif epoch.lost:
        yield Finding("weak", about, text, "GATEWAY_REDIS_REPLICAS=1 or min-replicas-to-write 1 against the next loss")
    else:
        yield Finding("ok", about, text)


async def check_outbox(outbox: Outbox) -> AsyncIterator[Finding]:
    """How far Postgres is behind, and what it has refused."""
    try:
        backlog = await outbox.backlog(int(time() * 1000))
    except RedisUnavailable as error:
        yield Finding("wrong", "outbox", f"cannot be read: {error}", "bring Redis back")
        return
    waits = f"{backlog.records} records, {backlog.bytes} bytes, the oldest {backlog.lag_ms / 1000:.1f} s old"
    if backlog.lag_ms > LAG_S * 1000:
        yield Finding("wrong", "outbox", waits, "have a worker run: `gateway worker`; its log tells what it waits for")
    else:
        yield Finding("ok", "outbox", waits)
    if backlog.dead:
        remedy = "`gateway dead` lists them with their reasons, `gateway dead --retry` tries again"
        yield Finding("wrong", "dead letters", f"{backlog.dead} records that Postgres refused", remedy)
    else:
        yield Finding("ok", "dead letters", "none")


async def check_postgres(postgres: Postgres, migrations: int) -> AsyncIterator[Finding]:
    """Whether Postgres can be reached, takes writes, and has as many migrations as this version knows."""
    try:
        writable = await postgres.is_writable()
    except PostgresUnavailable as error:
        remedy = "start it, or set GATEWAY_DATABASE_URL to where it is; what is answered waits in Redis meanwhile"
        yield Finding("wrong", "Postgres", f"cannot be used: {error}", remedy)
        return
    if writable:
        yield Finding("ok", "Postgres", "takes writes")
    else:
        remedy = "set default_transaction_read_only to off, or GATEWAY_DATABASE_URL to the server that takes writes"
        yield Finding("wrong", "Postgres", "is read-only", remedy)
    try:
        applied = await postgres.migrated_to()
    except PostgresUnavailable as error:
        yield Finding("wrong", "migrations", f"cannot be read: {error}", "gateway migrate")
        return
    text = f"{applied} of {migrations} applied"
    if applied < migrations:
        yield Finding("wrong", "migrations", text, "gateway migrate")
    elif applied > migrations:
        yield Finding("weak", "migrations", text, "the database is of a later version: update this one")
    else:
        yield Finding("ok", "migrations", text)
