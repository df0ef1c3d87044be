"""The servers that development and tests run on: they start, keep data, say clearly what is wrong, and end."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import asyncpg
import pytest
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from gateway.dev.servers.ports import PortTaken, ServerError, free_port, port_is_free
from gateway.dev.servers.postgres import PgBouncer, PostgresServer
from gateway.dev.servers.programs import find_pgbouncer
from gateway.dev.servers.redis import RedisCluster, RedisSentinel, RedisServer


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("server")


@pytest.fixture(scope="module")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PostgresServer]:
    with PostgresServer(tmp_path_factory.mktemp("postgres"), free_port(), database="gateway") as server:
        yield server


def asks(port: int) -> redis.Redis:
    return redis.Redis(host="127.0.0.1", port=port, decode_responses=True, socket_timeout=5)


def test_redis_starts_with_the_settings_the_gateway_needs_and_leaves_its_port_free(directory: Path) -> None:
    with RedisServer(directory, free_port()) as server, asks(server.port) as client:
        assert client.config_get("maxmemory-policy") == {"maxmemory-policy": "volatile-lru"}
        assert client.config_get("appendonly") == {"appendonly": "yes"}
        client.hset("session", mapping={str(number): "x" * 750 for number in range(60)})
        assert client.object("encoding", "session") == "listpack"
    assert not server.running
    assert port_is_free(server.port)


def test_redis_keeps_its_data_over_a_kill(directory: Path) -> None:
    with RedisServer(directory, free_port(), config={"appendfsync": "always"}) as server:
        with asks(server.port) as client:
            client.set("kept", "yes")
        server.kill()
        assert not server.running
        server.restart()
        os.kill(server.pid, signal.SIGKILL)  # a crash that the object did not cause
        while server.running:
            time.sleep(0.01)
        server.start()
        with asks(server.port) as client:
            assert client.get("kept") == "yes"


def test_a_paused_redis_does_not_answer_until_it_goes_on(directory: Path) -> None:
    with RedisServer(directory, free_port()) as server:
        server.pause()
        with (
            redis.Redis(port=server.port, socket_timeout=0.2, retry=Retry(NoBackoff(), 0)) as client,
            pytest.raises(redis.TimeoutError),
        ):
            client.ping()
        server.resume()
        with asks(server.port) as client:
            assert client.ping()
        server.pause()  # and a paused one still stops in good order


def test_a_taken_port_is_named(directory: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for server in (RedisServer(directory / "redis", port), PostgresServer(directory / "postgres", port)):
            with pytest.raises(ServerError, match=f"port {port} is in use by another program"):
                server.start()
            assert not server.running


@pytest.mark.parametrize("kind", [RedisServer, PostgresServer])
def test_a_port_that_is_taken_during_the_start_is_noticed(directory: Path, kind: type[RedisServer | PostgresServer]) -> None:
    """The server that took it answers there, but it is another one."""
    port = free_port()
    other = kind(directory / "other", port)

    class Late(kind):  # type: ignore[misc, valid-type]
        def _prepare(self) -> None:
            super()._prepare()
            other.start()

    with pytest.raises(PortTaken, match=f"port {port} is in use"):
        Late(directory / "late", port).start()
    other.stop()


def test_a_server_that_exits_at_its_start_shows_its_log(directory: Path) -> None:
    with pytest.raises(ServerError, match="no-such-directive"):
        RedisServer(directory, free_port(), config={"no-such-directive": "1"}).start()


def test_a_directory_serves_one_program_at_a_time(directory: Path) -> None:
    with RedisServer(directory, free_port()) as server:
        with pytest.raises(ServerError, match="in use by another running program"):
            RedisServer(directory, free_port()).start()
        assert server.running


def orphan(directory: Path, port: int, kind: type[RedisServer] | type[PostgresServer]) -> int:
    """Start a server from a process that then dies by kill -9; the process id of the server."""
    program = f"""
        import os, pathlib, signal
        from {kind.__module__} import {kind.__name__}
        server = {kind.__name__}(pathlib.Path({str(directory)!r}), {port})
        server.start()
        print(server.pid, flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
    """
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=root, stdout=subprocess.PIPE, check=False)
    assert done.returncode == -signal.SIGKILL
    return int(done.stdout)


@pytest.mark.parametrize("kind", [RedisServer, PostgresServer])
def test_a_server_left_by_a_killed_parent_is_replaced(
    kind: type[RedisServer] | type[PostgresServer], directory: Path
) -> None:
    port = free_port()
    left = orphan(directory, port, kind)
    os.kill(left, 0)
    with kind(directory, port) as server:
        assert server.pid != left  # on the same port, so the other one is gone


def test_a_pid_file_that_names_another_process_ends_nothing(directory: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as bystander:
        (directory / "redis.pid").write_text(str(bystander.pid))
        with RedisServer(directory, free_port()):
            assert bystander.poll() is None
        bystander.kill()


def test_every_node_of_a_cluster_serves_its_share(directory: Path) -> None:
    with RedisCluster(directory, [free_port() for _ in range(3)]) as cluster:
        for server in cluster.servers:
            with asks(server.port) as node:
                assert node.execute_command("CLUSTER INFO")["cluster_state"] == "ok"
        with redis.RedisCluster.from_url(cluster.url.replace("redis+cluster", "redis")) as client:
            keys = [f"key:{number}" for number in range(30)]
            for key in keys:
                client.set(key, "1")
            assert {client.get_node_from_key(key).port for key in keys} == {node.port for node in cluster.servers}


def test_a_sentinel_names_the_master_and_the_next_one(directory: Path) -> None:
    with (
        RedisSentinel(directory, master_port=free_port(), replica_port=free_port(), sentinel_port=free_port()) as group,
        asks(group.sentinel.port) as sentinel,
    ):

        def master() -> tuple[str, int]:
            address: tuple[str, int] = sentinel.sentinel_get_master_addr_by_name("gateway")
            return address

        assert master() == ("127.0.0.1", group.master.port)
        group.master.kill()
        deadline = time.monotonic() + 20
        while master() != ("127.0.0.1", group.replica.port):
            assert time.monotonic() < deadline


def test_replicas_of_a_cluster_take_over(directory: Path) -> None:
    ports, replica_ports = ([free_port() for _ in range(3)] for _ in range(2))
    with RedisCluster(directory, ports, replica_ports=replica_ports) as cluster:
        master, replica = cluster.servers[0], cluster.servers[3]
        assert replica.facts("INFO", "replication")["master_port"] == str(master.port)
        master.kill()
        deadline = time.monotonic() + 20
        while replica.facts("INFO", "replication").get("role") != "master":
            assert time.monotonic() < deadline
        cluster.start()  # starts the one that is missing, which follows the other one now
        assert master.facts("INFO", "replication")["master_port"] == str(replica.port)
        cluster.stop()
        cluster.start()
        assert master.facts("INFO", "replication")["role"] == "slave"


def test_three_sentinels_that_know_a_password_fail_over(directory: Path) -> None:
    password = {"requirepass": "pass", "user": "peer on >word ~* &* +@all", "masteruser": "peer", "masterauth": "word"}
    with RedisSentinel(
        directory,
        master_port=free_port(),
        replica_port=free_port(),
        sentinel_port=free_port(),
        more_replica_ports=[free_port()],
        more_sentinel_ports=[free_port(), free_port()],
        config=password,
    ) as group:
        assert group.sentinels[1].ask("SENTINEL", "CKQUORUM", "gateway") == (
            "OK 3 usable Sentinels. Quorum and failover authorization can be reached"
        )
        group.master.kill()
        deadline = time.monotonic() + 20
        while {sentinel.master_port() for sentinel in group.sentinels} & {group.master.port}:
            assert time.monotonic() < deadline
        assert group.sentinel.master_port() in {replica.port for replica in group.replicas}
        group.start()
        group.stop()
        group.start()
        assert group.master.follows()


async def count_busy(postgres: PostgresServer) -> int:
    link = await asyncpg.connect(postgres.url)
    count = await link.fetchval(
        "SELECT count(*) FROM pg_stat_activity WHERE query LIKE '%generate_series(1%' AND pid <> pg_backend_pid()"
    )
    await link.close()
    return int(count)


async def test_postgres_keeps_a_committed_row_over_a_kill_and_over_a_stop(postgres: PostgresServer) -> None:
    link = await asyncpg.connect(postgres.url)
    await link.execute("CREATE TABLE kept (word text)")
    await link.execute("INSERT INTO kept VALUES ('yes')")
    busy = asyncio.create_task(link.execute("SELECT count(*) FROM generate_series(1, 1000000000)"))
    async with asyncio.timeout(10):
        while not await count_busy(postgres):
            pass
    postgres.kill()
    assert not postgres.running
    postgres.restart()
    with pytest.raises(asyncpg.PostgresConnectionError):
        await busy
    for end in (postgres.stop, lambda: None):
        link = await asyncpg.connect(postgres.url)
        assert await link.fetchval("SELECT word FROM kept") == "yes"
        await link.close()
        end()
        postgres.start()


async def test_postgres_makes_databases_once(postgres: PostgresServer) -> None:
    url = postgres.create_database("another")
    assert postgres.create_database("another") == url
    link = await asyncpg.connect(url)
    assert await link.fetchval("SELECT current_database()") == "another"
    await link.close()


@pytest.mark.skipif(find_pgbouncer() is None, reason="pgbouncer is not installed")
async def test_pgbouncer_passes_clients_on(postgres: PostgresServer, directory: Path) -> None:
    with PgBouncer(directory, free_port(), postgres.url) as pooler:
        link = await asyncpg.connect(pooler.url, statement_cache_size=0)
        assert await link.fetchval("SELECT current_database()") == "gateway"
        await link.close()


def test_ports_differ_from_call_to_call() -> None:
    ports = [free_port() for _ in range(20)]
    assert len(set(ports)) == 20
