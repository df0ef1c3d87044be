"""Redis behind Sentinel: the client asks who the master is, and follows when another one becomes it."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from redis.asyncio import Redis

from gateway.dev.servers import redis as redis_module
from gateway.dev.servers.ports import free_port
from persistence.errors import RedisUnavailable
from persistence.redis.connection import connect
from persistence.redis.keys import Keys
from persistence.redis.pool import HeldPool
from persistence.redis.server_check import check_server
from tests.support.layer import Layer, new_turn
from tests.support.rule import breaches
from tests.support.serving import wait_for


@pytest.fixture(scope="module")
def sentinel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_module.RedisSentinel]:
    with redis_module.RedisSentinel(
        tmp_path_factory.mktemp("sentinel"), master_port=free_port(), replica_port=free_port(), sentinel_port=free_port()
    ) as group:
        yield group


@pytest.fixture
async def layer(sentinel: redis_module.RedisSentinel) -> AsyncIterator[Layer]:
    client = connect(sentinel.url)
    await client.flushall()
    layer = Layer(client, Keys("gw", 1))
    await check_server(client, layer.keys)
    yield layer
    await client.aclose()


async def _replicated(sentinel: redis_module.RedisSentinel) -> bool:
    offsets = []
    for server, name in ((sentinel.master, "master_repl_offset"), (sentinel.replica, "slave_repl_offset")):
        async with Redis(port=server.port) as client:
            offsets.append((await client.info("replication"))[name])
    return bool(offsets[0] == offsets[1])


async def test_the_layer_works_and_follows_a_promotion(sentinel: redis_module.RedisSentinel, layer: Layer) -> None:
    flushed, waiting = (await layer.open()).session_id, (await layer.open()).session_id
    await layer.chat(flushed)
    await layer.flush()
    await layer.chat(waiting, message_id="m1")
    begun, turn_id = await layer.begin(waiting)
    turn = new_turn(begun, turn_id)
    await wait_for(lambda: _replicated(sentinel), "the replica has it all")

    sentinel.master.kill()
    with pytest.raises(RedisUnavailable):
        await layer.chat(flushed)

    async def promoted() -> bool:
        try:
            return await layer.commit(begun, turn) is not None
        except RedisUnavailable:
            return False

    await wait_for(promoted, "the client follows the promotion", 60)
    hot = await layer.read(waiting)
    assert [one.message_id for one in hot.turns] == ["m1", None]
    assert hot.turns[1] == turn
    fences = [begun.fence, (await layer.begin(flushed))[0].fence]
    assert fences == sorted(set(fences)), "fences go on where they were"
    await layer.sessions.abort(flushed, (await layer.fields(flushed))["turn"])
    assert [record.fact for record in await layer.flush()] == ["t:1", "t:2"]
    assert await layer.has_ttl(waiting)
    assert not await breaches(layer.client, layer.keys)


async def _doubt_nothing(pool: HeldPool) -> None:
    """Keeps every connection when another server answers."""


@pytest.mark.parametrize("guarded", [True, False], ids=["as it is", "control: connections to the old master are kept"])
async def test_who_knows_the_new_master_writes_nothing_to_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """A master that hung is back before Sentinel tells it what it is now: what is written there is thrown away later."""
    if not guarded:
        monkeypatch.setattr(HeldPool, "_is_stale", lambda self, connection: False)
        monkeypatch.setattr(HeldPool, "_doubt", _doubt_nothing)
    with redis_module.RedisSentinel(
        tmp_path, master_port=free_port(), replica_port=free_port(), sentinel_port=free_port()
    ) as group:
        client = connect(group.url)
        layer = Layer(client, Keys("gw", 1))
        ids = [(await layer.open()).session_id for _ in range(20)]
        # As many connections as there are calls at once.
        await asyncio.gather(*map(layer.chat, ids))
        await wait_for(lambda: _replicated(group), "the replica has it all")
        group.master.pause()

        async def follows() -> bool:
            try:
                return bool(await layer.read(ids[0]))
            except RedisUnavailable:
                return False

        await wait_for(follows, "the client follows the promotion", 60)
        group.master.resume()
        await asyncio.gather(*map(layer.chat, ids))
        async with Redis(port=group.replica.port) as new:
            turns = [await new.hget(layer.keys.session(session_id), "turns") for session_id in ids]
        assert (turns == [b"2"] * 20) is guarded
        await client.aclose()
