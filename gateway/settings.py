"""The settings: environment variables with the prefix GATEWAY_, read and checked once, at the start.

A missing, misspelt or out-of-range variable stops the start with a sentence that names it.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from ipaddress import IPv4Network, IPv6Network, ip_network
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from persistence.redis.connection import connect
from persistence.redis.urls import UnusableUrl, default_partitions

PREFIX = "GATEWAY_"
TOKEN_BEGINS = "eyJ"  # noqa: S105
"""The beginning of every JSON Web Token, a JSON object in base64 (RFC 7515). No admin key may begin so."""

Network = IPv4Network | IPv6Network

Seconds = Annotated[float, msgspec.Meta(gt=0, le=31_536_000)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65_535)]
Secret = Annotated[str, msgspec.Meta(extra={"secret": True})]
"""A value that is never shown: a key, or a URL that can hold a password."""


class SettingsError(Exception):
    """A setting is missing or wrong; the message names its variable."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Every setting. The variable is GATEWAY_ and the field's name in capitals.

    `python -m gateway settings` prints this class: comments are the subjects, each docstring the setting's description.
    """

    # Stores
    redis_url: Secret = ""
    """redis://, rediss://, redis+sentinel://host:26379/service or redis+cluster://. For serve, worker, agents, dead."""
    redis_replicas: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    """Replicas of Redis that must have a turn before it is answered; with fewer in time it gets 503 not_replicated."""
    database_url: Secret = ""
    """postgresql://user:password@host:port/database; PgBouncer in transaction mode works. For the same, and migrate."""
    database_connections: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 8
    """Connections to Postgres per process."""
    partitions: Annotated[int, msgspec.Meta(ge=0, le=16_384)] = 0
    """Partitions of the keys; 0 is 1 on a single Redis or Sentinel and 256 on Redis Cluster. Recorded in Redis, never
    changes."""
    key_prefix: str = "gw"
    """First word of every Redis key: 1 to 32 of A-Z a-z 0-9 _ . -"""

    # Access
    secret_key: Secret = ""
    """Signs session tokens; at least 32 characters, the same on every pod. For serve."""
    secret_key_previous: Secret = ""
    """A key that still verifies tokens but signs none: for changing the key."""
    token_ttl_s: Seconds = 2_592_000
    """How long a session token is valid."""
    admin_key: Secret = ""
    """The bearer token of admin calls; at least 16 characters. For serve."""
    admin_key_previous: Secret = ""
    """An admin key that is still accepted: for changing the key."""
    admin_plaintext: bool = False
    """Accept admin calls from other machines without TLS: only for a network where nobody else listens."""
    trusted_proxies: str = ""
    """Addresses and networks whose X-Forwarded-For is believed, comma-separated. `*` is all: right only behind a proxy that
    drops what a client wrote into it. Empty: none."""

    # Server
    host: str = "127.0.0.1"
    """Address the pod listens on."""
    port: Port = 8000
    """Port the pod listens on."""
    drain_notice_s: Annotated[float, msgspec.Meta(ge=0, le=300)] = 5
    """How long a pod serves as usual after SIGTERM while /readyz already fails: longer than the balancer needs to notice."""
    drain_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 20
    """How long running turns may take to end after the notice, or a worker's backlog after SIGTERM."""
    worker_name: str = ""
    """Name of a worker in the consumer group; empty: host and process id."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """auto is text on a terminal and json elsewhere."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least important level that is logged."""

    # Graphs
    graphs: str = ""
    """Path of the operator's langgraph.json."""
    model_base_urls: str = ""
    """Endpoints that agents on the built-in graph `chat` may name as base_url, comma-separated."""

    # Sessions and turns
    session_timeout_s: Seconds = 86_400
    """A session without activity for this long is marked as timed out."""
    lease_s: Annotated[float, msgspec.Meta(ge=1, le=300)] = 15
    """How long a dead pod can block a session."""
    queue_wait_s: Annotated[float, msgspec.Meta(gt=0, le=300)] = 30
    """How long a message waits for the turn before it."""

    # Limits
    max_backlog: Annotated[int, msgspec.Meta(ge=1)] = 200_000
    """Records that may wait for Postgres before new turns get 503 backlog_full. Each partition has an even
    share, rounded up."""
    max_backlog_bytes: Annotated[int, msgspec.Meta(ge=1)] = 1_073_741_824
    """Bytes of those records, likewise."""
    max_body_bytes: Annotated[int, msgspec.Meta(ge=1_024, le=16_777_216)] = 262_144
    """Largest request body."""
    body_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=3_600)] = 20
    """How long a request body may take to arrive."""
    max_metadata_bytes: Annotated[int, msgspec.Meta(ge=2, le=16_777_216)] = 16_384
    """Largest metadata of a message or a session, as JSON."""
    max_message_chars: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 32_000
    """Longest message of a visitor."""
    address_rate_limit: str = "600/60"
    """Turns per client address over all pods, as messages/seconds; or off."""
    address_session_limit: str = ""
    """New sessions per client address over all pods, as sessions/seconds; or off. Empty: 300/60, or off where turns are."""
    max_streams_per_session: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 64
    """Streams of one session that may be open on one pod."""
    max_streams_per_address: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] = 1000
    """Streams of one client address that may be open on one pod."""
    limit_mode: Literal["enforce", "shadow", "off"] = "enforce"
    """shadow counts what the limits would refuse and refuses nothing; off checks no limit."""
    limit_failure: Literal["local", "refuse"] = "local"
    """While Redis cannot count: local limits each pod by what it knows, refuse answers 503 after 5 seconds."""

    @property
    def partition_count(self) -> int:
        return self.partitions or default_partitions(self.redis_url)

    @property
    def address_limit(self) -> tuple[int, int] | None:
        """Messages and seconds, or None for no limit."""
        return _rate(self.address_rate_limit)

    @property
    def session_limit(self) -> tuple[int, int] | None:
        """Sessions and seconds, or None for no limit."""
        return _rate(self.address_session_limit or ("off" if self.address_rate_limit == "off" else "300/60"))

    @property
    def trusted_networks(self) -> Sequence[Network] | None:
        """The networks of trusted proxies, or None for all addresses. Raises ValueError."""
        if self.trusted_proxies.strip() == "*":
            return None
        return [ip_network(item.strip(), strict=False) for item in self.trusted_proxies.split(",") if item.strip()]


def _rate(text: str) -> tuple[int, int] | None:
    if text == "off":
        return None
    count, _, seconds = text.partition("/")
    return int(count), int(seconds)


def variable_of(field: str) -> str:
    """The environment variable of a setting."""
    return PREFIX + field.upper()


def load_settings(environment: Mapping[str, str], required: Iterable[str] = ()) -> Settings:
    """The settings of an environment; an empty variable counts as not set. `required` names fields that must be set.

    Raises SettingsError.
    """
    fields = {field.name for field in msgspec.structs.fields(Settings)}
    values = {}
    for variable, value in environment.items():
        if not variable.startswith(PREFIX) or value == "":
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {variable_of(near[0])}?" if near else ""
            raise SettingsError(f"{variable} is not a setting{hint}")
        values[name] = value
    for name in required:
        if name not in values:
            raise SettingsError(f"{variable_of(name)} is not set")
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        raise SettingsError(f"{variable_of(where.rstrip('`'))}: {what[0].lower()}{what[1:]}") from error
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    if settings.redis_url:
        try:
            connect(settings.redis_url)
        except UnusableUrl as error:
            raise SettingsError(f"GATEWAY_REDIS_URL: {error}") from error
        except ValueError as error:
            raise SettingsError("GATEWAY_REDIS_URL is not a URL with a good host, port and database") from error
    if settings.database_url:
        _check_database_url(settings.database_url)
    for name, value, shortest in (
        ("SECRET_KEY", settings.secret_key, 32),
        ("SECRET_KEY_PREVIOUS", settings.secret_key_previous, 32),
        ("ADMIN_KEY", settings.admin_key, 16),
        ("ADMIN_KEY_PREVIOUS", settings.admin_key_previous, 16),
    ):
        if value and len(value) < shortest:
            raise SettingsError(f"GATEWAY_{name} is shorter than {shortest} characters")
    for name, value in (("ADMIN_KEY", settings.admin_key), ("ADMIN_KEY_PREVIOUS", settings.admin_key_previous)):
        if value.startswith(TOKEN_BEGINS):
            raise SettingsError(f"GATEWAY_{name} begins with {TOKEN_BEGINS}: it would be taken for a token")
        if value != value.strip() or not value.isascii():
            raise SettingsError(f"GATEWAY_{name} has spaces around it, or characters that no header can carry")
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,32}", settings.key_prefix):
        raise SettingsError("GATEWAY_KEY_PREFIX is not 1 to 32 of A-Z a-z 0-9 _ . -")
    _check_limits(settings)
    if settings.graphs and not Path(settings.graphs).is_file():
        raise SettingsError(f"GATEWAY_GRAPHS: there is no file {settings.graphs}")


def _check_limits(settings: Settings) -> None:
    for name, what, value in (
        ("RATE", "messages", settings.address_rate_limit),
        ("SESSION", "sessions", settings.address_session_limit),
    ):
        if value not in ("", "off") and not re.fullmatch(r"[1-9]\d{0,8}/[1-9]\d{0,5}", value):
            raise SettingsError(f"GATEWAY_ADDRESS_{name}_LIMIT is neither {what}/seconds, such as 60/60, nor off")
    try:
        _ = settings.trusted_networks
    except ValueError as error:
        raise SettingsError(f"GATEWAY_TRUSTED_PROXIES: {error}") from error


def _check_database_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        ports = [urlsplit(f"//{host}").port for host in parts.netloc.rpartition("@")[2].split(",")]
    except ValueError as error:
        raise SettingsError("GATEWAY_DATABASE_URL is not a URL with a good host and port") from error
    if parts.scheme not in ("postgresql", "postgres") or 0 in ports:
        raise SettingsError("GATEWAY_DATABASE_URL does not begin with postgresql://host:port")
