"""`gateway doctor` finds what is wrong with the stores, says what to do about it, and tells scripts by its exit status."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from gateway.app import Stores
from gateway.commands.doctor import examine
from gateway.dev.servers.ports import HOST, free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.process import wait_until
from gateway.dev.servers.redis import RedisServer
from gateway.settings import Settings
from persistence.checkup import Finding
from tests.support.commands import run_gateway
from tests.support.pods import environment_of
from tests.support.visiting import Flush


async def found(settings: Settings, **changes: Any) -> list[Finding]:
    """The findings, with changes to the settings."""
    changed = msgspec.structs.replace(settings, **changes)
    stores = Stores(changed)
    try:
        return [finding async for finding in examine(stores, changed)]
    finally:
        await stores.close()


async def amiss(settings: Settings, **changes: Any) -> list[tuple[str, str]]:
    """Level and subject of what is not ok. Each has a remedy, and what is ok may do without."""
    findings = [finding for finding in await found(settings, **changes) if finding.level != "ok"]
    assert all(finding.remedy for finding in findings), findings
    return [(finding.level, finding.about) for finding in findings]


async def test_of_healthy_stores_every_line_is_ok(stores: Stores, settings: Settings, flush: Flush) -> None:
    await flush()
    done = await run_gateway("doctor", variables=environment_of(settings))
    assert (done.status, done.error) == (0, ""), done
    lines = done.out.splitlines()
    assert len(lines) == 6
    assert all(line.startswith("ok ") for line in lines), done.out
    assert "append-only file on, replicas 0 (GATEWAY_REDIS_REPLICAS 0, min-replicas-to-write 0" in lines[0]


async def test_programs_read_json_and_the_exit_status(stores: Stores, settings: Settings, flush: Flush) -> None:
    await flush()
    variables = environment_of(settings) | {"GATEWAY_REDIS_REPLICAS": "1"}
    done = await run_gateway("doctor", "--json", variables=variables)
    assert (done.status, done.error) == (1, "gateway: 1 check failed\n")
    report = msgspec.json.decode(done.out)
    assert report["healthy"] is False
    (wrong,) = (finding for finding in report["findings"] if finding["level"] == "wrong")
    assert wrong == {
        "level": "wrong",
        "about": "Redis",
        "text": "replicas = 0, wanted = 1: turns are not answered",
        "remedy": "add replicas, or lower GATEWAY_REDIS_REPLICAS",
    }


async def test_what_redis_has_forgotten_is_told_by_partition(stores: Stores, settings: Settings, flush: Flush) -> None:
    await flush()
    counted: dict[Any, Any] = {"epoch": 3, "lost": 2, "stored_behind": 4, "erased_again": 1}
    await stores.client.hset(stores.keys.epoch(0), mapping=counted)
    assert await amiss(settings) == [("weak", "partition 0")]
    (told,) = (finding.text for finding in await found(settings) if finding.about == "partition 0")
    assert told.startswith("epoch 3 since 20")
    assert told.endswith("; turns: 2 lost at most, 4 stored behind; sessions: 1 erased again, 0 not compared")
    await stores.client.hset(stores.keys.epoch(0), "vouched", 5)
    assert await amiss(settings) == [("wrong", "partition 0")]


async def test_records_that_nobody_takes_and_dead_letters_are_wrong(stores: Stores, settings: Settings) -> None:
    outbox, dead = stores.keys.outbox(0), stores.keys.dead(0)
    await stores.client.xadd(outbox, {"fact": "of 1970"}, id="1-1")
    await stores.client.xadd(dead, {"fact": "t:1"})
    assert await amiss(settings) == [("wrong", "outbox"), ("wrong", "dead letters")]
    await stores.client.delete(outbox, dead)


async def test_a_redis_that_is_not_there_hides_nothing_of_postgres(settings: Settings) -> None:
    findings = await found(settings, redis_url=f"redis://{HOST}:{free_port()}/0")
    assert [(finding.level, finding.about) for finding in findings] == [
        ("wrong", "Redis"),
        ("ok", "Postgres"),
        ("ok", "migrations"),
    ]


async def test_another_number_of_partitions_is_wrong_and_nothing_is_recorded(stores: Stores, settings: Settings) -> None:
    assert await amiss(settings, partitions=4) == [("wrong", "Redis")]
    await stores.client.delete(stores.keys.meta)
    assert await amiss(settings, partitions=1) == []
    assert not await stores.client.exists(stores.keys.meta)


@pytest.mark.parametrize(
    ("config", "level"),
    [({"appendonly": "no"}, "weak"), ({"maxmemory-policy": "allkeys-lru"}, "wrong")],
    ids=["no append-only file", "a policy that evicts"],
)
async def test_a_redis_that_loses_what_was_answered_is_named(
    settings: Settings, tmp_path: Path, config: dict[str, str], level: str
) -> None:
    with RedisServer(tmp_path, free_port(), config=config) as redis:
        assert await amiss(settings, redis_url=redis.url) == [(level, "Redis")]


async def test_a_master_that_goes_on_without_its_replicas_is_weak(settings: Settings, tmp_path: Path) -> None:
    with RedisServer(tmp_path / "one", free_port(), config={"repl-diskless-sync-delay": "0"}) as master:
        config = {"replicaof": f"{HOST} {master.port}"}
        with RedisServer(tmp_path / "two", free_port(), config=config) as replica:
            assert wait_until(replica.follows, 15), "the replica follows"
            (told,) = (
                finding for finding in await found(settings, redis_url=master.url, redis_replicas=1) if finding.level != "ok"
            )
    assert (told.level, told.about) == ("weak", "Redis")
    assert told.text.startswith("min_replicas_to_write = 0, min_replicas_max_lag = 10: a master that is cut off")


async def test_a_postgres_that_is_away_read_only_or_not_migrated_is_wrong(
    stores: Stores, settings: Settings, postgres_server: PostgresServer
) -> None:
    assert await amiss(settings) == []
    away = f"postgresql://postgres@{HOST}:{free_port()}/gateway"
    assert await amiss(settings, database_url=away) == [("wrong", "Postgres")]
    read_only = f"{settings.database_url}?default_transaction_read_only=on"
    assert await amiss(settings, database_url=read_only) == [("wrong", "Postgres")]
    empty = postgres_server.create_database("not_migrated")
    assert await amiss(settings, database_url=empty) == [("wrong", "migrations")]
