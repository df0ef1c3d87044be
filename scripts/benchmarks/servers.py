"""What the measurements share: stores of their own, and gateway processes on them."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from gateway.dev.servers.ports import free_port
from gateway.dev.servers.postgres import PostgresServer
from gateway.dev.servers.redis import RedisServer

ROOT = Path(__file__).resolve().parents[2]
KEY = "a key of the bench's own, 32 characters"
DEFAULTS: Mapping[str, str] = {}


class Servers(NamedTuple):
    """A Redis and a migrated Postgres, the variables of processes that work on them, and a folder for their logs."""

    redis: RedisServer
    postgres: PostgresServer
    environment: Mapping[str, str]
    folder: Path


@contextmanager
def own_servers(redis_config: Mapping[str, str] = DEFAULTS, checkout: Path = ROOT, /, **variables: str) -> Iterator[Servers]:
    """Both stores, empty, gone at the end; as in production, Redis with its append-only file (`everysec`), Postgres with
    `fsync`. `variables` are added to the environment. The migrations are those of `checkout`."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # PostgreSQL may run as another user than this one.
        folder.chmod(0o755)
        redis = RedisServer(folder / "redis", free_port(), config=redis_config)
        postgres = PostgresServer(folder / "postgres", free_port(), database="gateway")
        with redis, postgres:
            environment = {
                **{name: value for name, value in os.environ.items() if not name.startswith("GATEWAY_")},
                "GATEWAY_REDIS_URL": redis.url,
                "GATEWAY_DATABASE_URL": postgres.url,
                "GATEWAY_SECRET_KEY": KEY,
                "GATEWAY_ADMIN_KEY": KEY,
                "GATEWAY_PORT": str(free_port()),
                "GATEWAY_ADDRESS_RATE_LIMIT": "off",
                "GATEWAY_ADDRESS_SESSION_LIMIT": "off",
                "GATEWAY_MAX_STREAMS_PER_ADDRESS": "100000",
                "GATEWAY_MAX_STREAMS_PER_SESSION": "100000",
                **variables,
            }
            command = [sys.executable, "-m", "gateway", "migrate"]
            place = {**environment, "PYTHONPATH": str(checkout)}
            subprocess.run(command, env=place, check=True, stdout=subprocess.DEVNULL, cwd=checkout)
            yield Servers(redis, postgres, environment, folder)


@contextmanager
def gateway(command: str, servers: Servers) -> Iterator[int]:
    """`python -m gateway <command>` as a process, ended at the end; its process id. It runs on the cores of its starter."""
    with (servers.folder / f"{command}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, "-m", "gateway", command], env=servers.environment, stderr=log)
        try:
            yield process.pid
        finally:
            process.terminate()
            process.wait(60)
