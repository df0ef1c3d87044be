"""The URLs of Redis: a single server, Sentinel or Cluster.

`redis+sentinel://[user:password@]host[:26379][,host:port...]/<service>[/<db>][?sentinel_username=&sentinel_password=]` and
`redis+cluster://[user:password@]host[:port][,host:port...]` are this project's spellings; the plain schemes are redis-py's.
`rediss` instead of `redis` is TLS.
"""

from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec

CLUSTER_PARTITIONS = 256
URL_OPTIONS = frozenset(
    ("ssl_cert_reqs", "ssl_ca_certs", "ssl_certfile", "ssl_keyfile", "ssl_check_hostname", "client_name", "db")
)
"""Options that a URL may set: none that would undo the timeouts and the protocol that the guarantees need."""
SENTINEL_OPTIONS = frozenset(("sentinel_username", "sentinel_password"))
SCHEMES = "redis, rediss, redis+sentinel, rediss+sentinel, redis+cluster, rediss+cluster"


class UnusableUrl(ValueError):
    """Not a URL of Redis. The message quotes nothing of it but names of options, for a URL holds a password."""


class RedisUrl(msgspec.Struct, frozen=True):
    """A URL taken apart; of a single server only `kind`, for redis-py reads that URL itself. None: not given."""

    kind: Literal["single", "sentinel", "cluster"]
    tls: bool = False
    username: str | None = None
    password: str | None = None
    hosts: tuple[tuple[str, int], ...] = ()
    service: str = ""
    db: int = 0
    sentinel_username: str | None = None
    sentinel_password: str | None = None


def is_cluster(url: str) -> bool:
    """Whether the URL names a Redis Cluster."""
    return "+cluster" in urlsplit(url).scheme


def default_partitions(url: str) -> int:
    """1 on a single Redis or Sentinel, 256 on Redis Cluster."""
    return CLUSTER_PARTITIONS if is_cluster(url) else 1


def parse_url(url: str) -> RedisUrl:
    """Takes a URL apart. Raises UnusableUrl, or another ValueError (a port or database that is no number)."""
    parts = urlsplit(url)
    scheme, _, kind = parts.scheme.partition("+")
    if scheme not in ("redis", "rediss") or kind not in ("", "sentinel", "cluster"):
        raise UnusableUrl(f"the scheme is not one of {SCHEMES}")
    query = parse_qs(parts.query)
    allowed = SENTINEL_OPTIONS if kind == "sentinel" else URL_OPTIONS
    for name in query:
        if name not in allowed:
            raise UnusableUrl(f"option {name} is not one of {', '.join(sorted(allowed))}")
    if not kind:
        return RedisUrl("single")
    tls = scheme == "rediss"
    credentials, _, netloc = parts.netloc.rpartition("@")
    username, _, password = (unquote(part) or None for part in credentials.partition(":"))
    path = parts.path.strip("/")
    if kind == "cluster":
        if path:
            raise UnusableUrl("a cluster has no databases: the URL ends after the hosts")
        return RedisUrl("cluster", tls, username, password, _hosts(netloc, 6379))
    service, _, db = path.partition("/")
    if not service:
        raise UnusableUrl("a Sentinel URL names the service in its path: redis+sentinel://host:26379/<service>")
    return RedisUrl(
        "sentinel",
        tls,
        username,
        password,
        _hosts(netloc, 26379),
        service,
        int(db or 0),
        *(query.get(f"sentinel_{name}", [None])[0] for name in ("username", "password")),
    )


def _hosts(netloc: str, default_port: int) -> tuple[tuple[str, int], ...]:
    found = []
    for part in netloc.split(","):
        split = urlsplit(f"//{part}")
        if not split.hostname:
            raise UnusableUrl("a host is missing")
        found.append((split.hostname, split.port or default_port))
    return tuple(found)
