"""The probe of readiness on a cluster: one dead shard, and it alone, leaves every pod ready."""

from collections.abc import AsyncIterator, Iterator

import pytest

from gateway.dev.servers import redis as redis_module
from gateway.dev.servers.ports import free_port
from persistence.errors import PersistenceError, RedisUnavailable
from persistence.redis import probe as probe_module
from persistence.redis.connection import connect
from persistence.redis.keys import Keys
from persistence.redis.probe import Probe
from persistence.redis.scripts import Scripts
from tests.support.serving import wait_for

PARTITIONS = 256
TRIES = 40


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_module.RedisCluster]:
    config = {"cluster-require-full-coverage": "no"}
    ports = [free_port() for _ in range(3)]
    with redis_module.RedisCluster(tmp_path_factory.mktemp("cluster"), ports, config=config) as cluster:
        yield cluster


@pytest.fixture
async def probe(cluster: redis_module.RedisCluster, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Probe]:
    """A probe that writes each time."""
    monkeypatch.setattr(probe_module, "FRESH_S", 0.0)
    client = connect(cluster.url)
    scripts = Scripts(client)
    probe = Probe(scripts, Keys("gw", PARTITIONS))
    await probe.check()
    yield probe
    await scripts.drop_connections()
    await client.aclose()


async def outcomes(probe: Probe) -> list[bool]:
    """Of several pods, as it were: which partition took the last write is another for each."""
    found = []
    for number in range(TRIES):
        probe._good = number * PARTITIONS // TRIES
        try:
            await probe.check()
        except RedisUnavailable:
            found.append(False)
        else:
            found.append(True)
    return found


async def test_a_dead_shard_leaves_every_pod_ready(cluster: redis_module.RedisCluster, probe: Probe) -> None:
    cluster.servers[1].kill()
    try:
        assert await outcomes(probe) == [True] * TRIES
    finally:
        cluster.servers[1].start()


async def test_a_hung_shard_leaves_every_pod_ready_and_costs_one_wait(
    cluster: redis_module.RedisCluster, probe: Probe
) -> None:
    cluster.servers[1].pause()
    try:
        for _ in range(3):
            await probe.check()
    finally:
        cluster.servers[1].resume()


async def test_with_all_shards_dead_no_pod_is_ready_until_they_are_back(
    cluster: redis_module.RedisCluster, probe: Probe
) -> None:
    for server in cluster.servers:
        server.kill()
    try:
        with pytest.raises(RedisUnavailable):
            await probe.check()
    finally:
        for server in cluster.servers:
            server.start()

    async def ready() -> bool:
        try:
            await probe.check()
        except RedisUnavailable:
            return False
        return True

    await wait_for(ready, "the pod is ready again", 30)


async def test_control_a_probe_of_few_partitions_takes_a_healthy_pod_out(
    cluster: redis_module.RedisCluster, probe: Probe, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def only_the_last(self: Probe) -> PersistenceError | None:
        return await self._try(self._good)

    monkeypatch.setattr(Probe, "_find_error", only_the_last)
    cluster.servers[1].kill()
    try:
        found = await outcomes(probe)
    finally:
        cluster.servers[1].start()
    assert 0 < found.count(False) < TRIES
