"""The settings: environment variables with the prefix GATEWAY_, read once, complete when built.

A variable that is missing, misspelt or out of range stops the start with a sentence that names it.
"""

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Literal
from urllib.parse import urlsplit

import msgspec

from persistence.connection import connect, default_partitions

PREFIX = "GATEWAY_"

Seconds = Annotated[float, msgspec.Meta(gt=0, le=31_536_000)]
Port = Annotated[int, msgspec.Meta(ge=1, le=65_535)]


class SettingsError(Exception):
    """A setting is missing or wrong; the message is a sentence that names it."""


class Settings(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Every setting. The name of the variable is the field's, in capitals, behind GATEWAY_."""

    redis_url: str = ""
    """redis://, rediss://, redis+sentinel:// or redis+cluster://"""
    database_url: str = ""
    """postgresql://user:password@host:port/database"""
    secret_key: str = ""
    """Signs session tokens; at least 32 characters, the same on every pod."""
    secret_key_previous: str = ""
    """A key that still verifies tokens but signs none: for changing the key."""
    admin_key: str = ""
    """What admin calls carry as a bearer token; at least 16 characters."""
    graphs: str = ""
    """Path of the operator's langgraph.json."""
    model_base_urls: str = ""
    """Endpoints that agents on the built-in graph `chat` may name as base_url, comma-separated."""
    host: str = "127.0.0.1"
    """Address the pod listens on."""
    port: Port = 8000
    """Port the pod listens on."""
    partitions: Annotated[int, msgspec.Meta(ge=0, le=16_384)] = 0
    """Partitions of the keys; 0 is 1 on a single Redis or Sentinel and 256 on Redis Cluster. Never changes."""
    key_prefix: str = "gw"
    """First word of every Redis key."""
    session_timeout_s: Seconds = 86_400
    """A session without activity for so long is marked as timed out."""
    token_ttl_s: Seconds = 2_592_000
    """How long a session token is good for."""
    lease_s: Annotated[float, msgspec.Meta(ge=1, le=300)] = 15
    """How long a dead pod can block a session."""
    queue_wait_s: Annotated[float, msgspec.Meta(gt=0, le=300)] = 30
    """How long a message waits for the turn before it."""
    drain_notice_s: Annotated[float, msgspec.Meta(ge=0, le=300)] = 5
    """How long a pod goes on as usual after SIGTERM while /readyz fails already: balancers need some seconds to notice."""
    drain_s: Annotated[float, msgspec.Meta(ge=0, le=600)] = 20
    """How long running turns may take to end after the notice, or a worker's backlog after SIGTERM."""
    max_backlog: Annotated[int, msgspec.Meta(ge=1)] = 200_000
    """Records that may wait for Postgres before new turns get 503 backlog_full. A partition has an even share."""
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
    """Turns per client address as messages/seconds, over all pods; or off."""
    trusted_proxies: str = ""
    """Addresses whose X-Forwarded-For is believed, comma-separated; * for all. Empty: nobody's."""
    database_connections: Annotated[int, msgspec.Meta(ge=1, le=1_000)] = 8
    """Connections to Postgres per process."""
    worker_name: str = ""
    """Name of a worker among its like; empty: host and process id."""
    log_format: Literal["auto", "json", "text"] = "auto"
    """text on a terminal, json elsewhere, unless set."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least important level that is logged."""

    @property
    def partition_count(self) -> int:
        return self.partitions or default_partitions(self.redis_url)

    @property
    def address_limit(self) -> tuple[int, int] | None:
        """Messages and seconds, or None for no limit."""
        if self.address_rate_limit == "off":
            return None
        messages, _, seconds = self.address_rate_limit.partition("/")
        return int(messages), int(seconds)


def load_settings(environment: Mapping[str, str], required: Iterable[str] = ()) -> Settings:
    """Settings from an environment. `required` names fields that must be set. Raises SettingsError."""
    fields = {field.name for field in msgspec.structs.fields(Settings)}
    values = {}
    for variable, value in environment.items():
        if not variable.startswith(PREFIX) or value == "":
            continue
        name = variable.removeprefix(PREFIX).lower()
        if name not in fields:
            near = difflib.get_close_matches(name, fields, 1)
            hint = f"; did you mean {PREFIX}{near[0].upper()}?" if near else ""
            raise SettingsError(f"{variable} is not a setting{hint}")
        values[name] = value
    for name in required:
        if name not in values:
            raise SettingsError(f"{PREFIX}{name.upper()} is not set")
    try:
        settings = msgspec.convert(values, Settings, strict=False)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        raise SettingsError(f"{PREFIX}{where.rstrip('`').upper()}: {what[0].lower()}{what[1:]}") from error
    _check(settings)
    return settings


def _check(settings: Settings) -> None:
    if settings.redis_url:
        try:
            connect(settings.redis_url)
        except ValueError as error:
            raise SettingsError(f"GATEWAY_REDIS_URL: {error}") from error
    if settings.database_url:
        _check_database_url(settings.database_url)
    for name, value, shortest in (
        ("SECRET_KEY", settings.secret_key, 32),
        ("SECRET_KEY_PREVIOUS", settings.secret_key_previous, 32),
        ("ADMIN_KEY", settings.admin_key, 16),
    ):
        if value and len(value) < shortest:
            raise SettingsError(f"GATEWAY_{name} is shorter than {shortest} characters")
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,32}", settings.key_prefix):
        raise SettingsError("GATEWAY_KEY_PREFIX is not 1 to 32 of A-Z a-z 0-9 _ . -")
    if settings.address_rate_limit != "off" and not re.fullmatch(r"[1-9]\d{0,8}/[1-9]\d{0,5}", settings.address_rate_limit):
        raise SettingsError("GATEWAY_ADDRESS_RATE_LIMIT is neither messages/seconds, such as 600/60, nor off")
    if settings.graphs and not Path(settings.graphs).is_file():
        raise SettingsError(f"GATEWAY_GRAPHS: there is no file {settings.graphs}")


def _check_database_url(url: str) -> None:
    try:
        parts = urlsplit(url)
        ports = [urlsplit(f"//{host}").port for host in parts.netloc.rpartition("@")[2].split(",")]
    except ValueError as error:
        raise SettingsError("GATEWAY_DATABASE_URL is not a URL with a good host and port") from error
    if parts.scheme not in ("postgresql", "postgres") or 0 in ports:
        raise SettingsError("GATEWAY_DATABASE_URL does not begin with postgresql://host:port")
