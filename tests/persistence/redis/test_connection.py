"""Which Redis the gateway connects to, and which it refuses to run on."""

from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from redis.asyncio import Redis, RedisCluster
from structlog.testing import capture_logs

from gateway.dev.servers import redis as redis_module
from gateway.dev.servers.ports import free_port
from gateway.dev.servers.redis import RedisServer
from persistence.errors import RedisUnavailable, UnsuitableRedis
from persistence.redis.connection import RETRIES, Client, call, connect
from persistence.redis.keys import Keys
from persistence.redis.server_check import check_server, check_version
from persistence.redis.urls import default_partitions, is_cluster


@pytest.fixture
async def client(redis_server: RedisServer) -> AsyncIterator[Client]:
    client = connect(redis_server.url)
    await client.flushall()
    yield client
    await client.execute_command("CONFIG", "SET", "maxmemory-policy", "volatile-lru")
    await client.execute_command("CONFIG", "SET", "appendonly", "yes")
    await client.aclose()


def arguments(client: Client) -> dict[str, Any]:
    """What the client's connections are made with."""
    if isinstance(client, RedisCluster):
        return dict(client.connection_kwargs)
    return dict(client.connection_pool.connection_kwargs)


# ----------------------------------------------------------------------------------------------------------------- URLs


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://host", {"host": "host"}),
        ("redis://host:6380/3", {"host": "host", "port": 6380, "db": 3}),
        ("redis://user:p%40ss@host:6380/0", {"username": "user", "password": "p@ss"}),
        ("redis://:secret@host", {"password": "secret"}),
        ("rediss://host:6380/1", {"host": "host", "port": 6380, "db": 1}),
        ("redis+sentinel://one,two:26380/main/2", {"db": 2}),
        ("redis+sentinel://user:p%40ss@one/main", {"username": "user", "password": "p@ss", "db": 0}),
        ("rediss+sentinel://one/main", {}),
        ("redis+cluster://one,two:6380", {}),
        ("redis+cluster://user:p%40ss@one", {"username": "user", "password": "p@ss"}),
    ],
)
async def test_a_url_says_where_redis_is_and_nothing_of_timeouts(url: str, expected: dict[str, Any]) -> None:
    found = arguments(connect(url))
    assert {name: found[name] for name in expected} == expected
    assert (found["protocol"], found["socket_timeout"], found["socket_connect_timeout"]) == (2, 1.0, 0.5)
    assert found["decode_responses"] is False
    if "+cluster" not in url:  # there the client repeats, and not its connections
        assert found["retry"]._retries == RETRIES


@pytest.mark.parametrize("option", ["protocol=3", "decode_responses=true", "socket_timeout=60"])
def test_options_in_a_url_do_not_undo_what_the_promises_need(option: str) -> None:
    with pytest.raises(ValueError, match=f"option {option.partition('=')[0]} is not one of"):
        connect(f"redis://host?{option}")


async def test_tls_is_used_where_the_url_says_so() -> None:
    single = connect("rediss://host")
    assert isinstance(single, Redis)
    assert "SSL" in single.connection_pool.connection_class.__name__
    cluster = connect("rediss+cluster://host")
    assert isinstance(cluster, RedisCluster)
    assert "SSL" in cluster.connection_kwargs["connection_class"].__name__ or cluster.connection_kwargs.get("ssl")
    master: Any = connect("rediss+sentinel://host/main")
    assert "SSL" in master.connection_pool.connection_class.__name__


async def test_a_sentinel_url_with_tls_uses_it_towards_the_sentinels_too() -> None:
    master: Any = connect("rediss+sentinel://host/main")
    sentinel = master.connection_pool.sentinel_manager.sentinels[0]
    assert "SSL" in sentinel.connection_pool.connection_class.__name__


async def test_a_sentinel_url_names_service_sentinels_and_their_own_password() -> None:
    master: Any = connect("redis+sentinel://:redis@one,two:26380/main?sentinel_username=s&sentinel_password=p%2Bw")
    pool = master.connection_pool
    assert pool.service_name == "main"
    sentinels = [sentinel.connection_pool.connection_kwargs for sentinel in pool.sentinel_manager.sentinels]
    assert [(one["host"], one["port"]) for one in sentinels] == [("one", 26379), ("two", 26380)]
    assert all((one["username"], one["password"], one["socket_timeout"]) == ("s", "p+w", 1.0) for one in sentinels)
    assert pool.connection_kwargs["password"] == "redis"


async def test_a_cluster_url_names_its_first_nodes() -> None:
    client = connect("redis+cluster://one,two:6380")
    assert isinstance(client, RedisCluster)
    assert sorted(node.port for node in client.nodes_manager.startup_nodes.values()) == [6379, 6380]


@pytest.mark.parametrize(
    "url",
    [
        "",
        "localhost:6379",
        "http://host",
        "redis+proxy://host",
        "valkey://host",
        "unix:///tmp/redis.sock",
        "redis://host:port",
        "redis+sentinel://host",
        "redis+sentinel://host/",
        "redis+sentinel://host/main/two",
        "redis+sentinel:///main",
        "redis+cluster://",
        "redis+cluster://one,,two",
        "redis+cluster://host:99999",
        "redis+cluster://host/3",
    ],
)
async def test_a_wrong_url_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"."):
        connect(url)


def test_the_number_of_partitions_follows_from_the_url() -> None:
    assert [default_partitions(url) for url in ("redis://h", "redis+sentinel://h/m", "rediss+cluster://h")] == [1, 1, 256]
    assert not is_cluster("redis://host/+cluster")


# ---------------------------------------------------------------------------------------------------------- start checks


@pytest.mark.parametrize("policy", ["allkeys-lru", "allkeys-lfu", "allkeys-random"])
async def test_a_policy_that_could_evict_unflushed_answers_is_refused(client: Client, policy: str) -> None:
    await client.execute_command("CONFIG", "SET", "maxmemory-policy", policy)
    with pytest.raises(UnsuitableRedis, match=f"maxmemory-policy is {policy}"):
        await check_server(client, Keys("gw", 1))


@pytest.mark.parametrize("policy", ["volatile-lru", "volatile-lfu", "volatile-ttl", "volatile-random", "noeviction"])
async def test_other_policies_are_accepted(client: Client, policy: str) -> None:
    await client.execute_command("CONFIG", "SET", "maxmemory-policy", policy)
    with capture_logs() as logs:
        await check_server(client, Keys("gw", 1))
    assert logs == []


async def test_a_server_without_an_append_only_file_is_warned_about(client: Client) -> None:
    await client.execute_command("CONFIG", "SET", "appendonly", "no")
    with capture_logs() as logs:
        await check_server(client, Keys("gw", 1))
    assert [(line["event"], line["log_level"]) for line in logs] == [("redis.aof_off", "warning")]
    assert logs[0]["remedy"] == "CONFIG SET appendonly yes"


async def test_another_number_of_partitions_is_refused(client: Client) -> None:
    await check_server(client, Keys("gw", 4))
    assert await client.execute_command("HGET", "gw:meta", "partitions") == b"4"
    with pytest.raises(UnsuitableRedis, match="partitions = 4, this process is set to 1"):
        await check_server(client, Keys("gw", 1))
    await check_server(client, Keys("gw", 4))
    await check_server(client, Keys("other", 1))


async def test_another_format_of_keys_is_refused(client: Client) -> None:
    await client.execute_command("HSET", "gw:meta", "format", "2")
    with pytest.raises(UnsuitableRedis, match="format = 2, this process is set to 1"):
        await check_server(client, Keys("gw", 1))


async def test_a_server_that_is_not_there_is_unavailable_and_not_unsuitable() -> None:
    client = connect(f"redis://127.0.0.1:{free_port()}")
    with pytest.raises(RedisUnavailable):
        await check_server(client, Keys("gw", 1))
    await client.aclose()


async def test_a_wrong_password_is_unavailable(tmp_path: Path) -> None:
    with RedisServer(tmp_path, free_port(), config={"requirepass": "secret"}) as server:
        right, wrong = server.url.replace("//", "//:secret@"), server.url
        for url, fails in ((right, False), (wrong, True)):
            client = connect(url)
            if fails:
                with pytest.raises(RedisUnavailable, match="Authentication"):
                    await check_server(client, Keys("gw", 1))
            else:
                await check_server(client, Keys("gw", 1))
            await client.aclose()


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[redis_module.RedisCluster]:
    with redis_module.RedisCluster(tmp_path_factory.mktemp("cluster"), [free_port() for _ in range(3)]) as cluster:
        yield cluster


async def test_every_node_of_a_cluster_is_checked(cluster: redis_module.RedisCluster) -> None:
    client = connect(cluster.url)
    await check_server(client, Keys("gw", 256))
    for server in cluster.servers:
        node = Redis(port=server.port)
        await node.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(UnsuitableRedis, match="allkeys-lru"):
            await check_server(client, Keys("gw", 256))
        await node.config_set("maxmemory-policy", "volatile-lru")
        await node.aclose()
    await check_server(client, Keys("gw", 256))
    await client.aclose()


async def test_a_cluster_is_found_through_a_node_that_is_up(cluster: redis_module.RedisCluster) -> None:
    client = connect(f"redis+cluster://127.0.0.1:{free_port()},127.0.0.1:{cluster.servers[1].port}")
    await check_server(client, Keys("gw", 256))
    await client.aclose()


# -------------------------------------------------------------------------------------------------------------- versions


@pytest.mark.parametrize(
    "info",
    [
        {"redis_version": "7.0.0"},
        {"redis_version": "7.0.15"},
        {"redis_version": "7.4.2"},
        {"redis_version": "8.2.1"},
        {"redis_version": "10.0"},
        {"redis_version": "7.2.4", "valkey_version": "7.2.8"},
        {"redis_version": "7.2.4", "valkey_version": "8.0.1"},
        {"redis_version": "7.2.4", "valkey_version": "9.0.0"},
        {"redis_version": "7.2.4", "valkey_version": "9.0.0-rc1"},
        {"redis_version": 7.4},
    ],
)
def test_these_versions_work(info: dict[str, Any]) -> None:
    check_version(info)


@pytest.mark.parametrize(
    ("info", "named"),
    [
        ({"redis_version": "6.2.14"}, "Redis 6.2.14"),
        ({"redis_version": "6.9.240"}, "Redis 6.9.240"),
        ({"redis_version": "2.8.0"}, "Redis 2.8.0"),
        ({"redis_version": "7.2.4", "valkey_version": "7.0.0"}, "Valkey 7.0.0"),
        ({"redis_version": "7.2.4", "valkey_version": "6.2.1"}, "Valkey 6.2.1"),
        ({"redis_version": "unknown"}, "Redis unknown"),
        ({}, "Redis 0"),
    ],
)
def test_these_versions_are_too_old(info: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsuitableRedis, match=f"{named} is too old"):
        check_version(info)


# ---------------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("unable to perform operation on <TCPTransport closed=True>; the handler is closed"),
        AttributeError("'NoneType' object has no attribute 'writelines'"),
    ],
)
async def test_a_connection_that_was_closed_under_a_call_is_an_unavailable_redis(error: Exception) -> None:
    async def operation() -> None:
        raise error

    with pytest.raises(RedisUnavailable):
        await call(operation)


async def test_another_runtime_error_is_not_taken_for_an_unavailable_redis() -> None:
    async def operation() -> None:
        raise RuntimeError("a mistake")

    with pytest.raises(RuntimeError, match="a mistake"):
        await call(operation)
