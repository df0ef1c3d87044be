"""Redis behind Sentinel: the client asks who the master is, and follows when another one becomes it."""

from collections.abc import AsyncIterator, Iterator

import pytest

from gateway import servers
from gateway.servers import free_port
from persistence.connection import check_server, connect
from persistence.errors import RedisUnavailable
from persistence.keys import Keys
from tests.support.layer import Layer, new_turn
from tests.support.rule import breaches
from tests.support.serving import wait_for


@pytest.fixture(scope="module")
def sentinel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[servers.RedisSentinel]:
    with servers.RedisSentinel(
        tmp_path_factory.mktemp("sentinel"), master_port=free_port(), replica_port=free_port(), sentinel_port=free_port()
    ) as group:
        yield group


@pytest.fixture
async def layer(sentinel: servers.RedisSentinel) -> AsyncIterator[Layer]:
    client = connect(sentinel.url)
    await client.flushall()
    layer = Layer(client, Keys("gw", 1))
    await check_server(client, layer.keys)
    yield layer
    await client.aclose()


async def test_the_layer_works_and_follows_a_promotion(sentinel: servers.RedisSentinel, layer: Layer) -> None:
    flushed, waiting = (await layer.open()).session_id, (await layer.open()).session_id
    await layer.chat(flushed)
    await layer.flush()
    await layer.chat(waiting, message_id="m1")
    begun, turn_id = await layer.begin(waiting)
    turn = new_turn(begun, turn_id)
    assert await layer.client.execute_command("WAIT", 1, 5000) == 1, "the replica has it all"

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
