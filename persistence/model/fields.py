"""The fields of a session."""

import re
from collections.abc import Callable
from typing import Any

import msgspec

from persistence.model.times import moment

_object_decoder = msgspec.json.Decoder(dict[str, Any])

RECORD_FORMAT = 2
"""The newest format of records that this version reads; that of everything else is `keys.FORMAT`."""

HEADER = (
    "format",
    "id",
    "session_id",
    "agent_id",
    "channel",
    "status",
    "user_id",
    "website_domain",
    "ip_address",
    "user_agent",
    "started_at",
    "last_activity_at",
    "ended_at",
    "message_count",
    "context",
    "metadata",
    "minted",
    "turns",
    "revision",
)
"""The fields of a session that describe it, in the order in which scripts return them (lua/prelude); a record of format 1
has each as a field, one of format 2 has the session as JSON."""

HEADER_BYTES = tuple(name.encode() for name in HEADER)

_UUID = re.compile(r"[0-9A-Fa-f]{8}(-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}")


def _uuid(text: str) -> str:
    if not _UUID.fullmatch(text):
        raise ValueError("no UUID")
    return text


def _moment(text: str) -> str:
    moment(text)
    return text


def whole(text: str) -> int:
    if not (text.isascii() and text.isdigit()):
        raise ValueError("no whole number")
    return int(text)


def _one_of(*known: str) -> Callable[[str], str]:
    def read(text: str) -> str:
        if text not in known:
            raise ValueError("not one of those that there are")
        return text

    return read


READERS: tuple[tuple[str, Callable[[str], Any]], ...] = tuple(
    zip(
        HEADER[1:],
        (
            _uuid,
            str,
            lambda text: text and _uuid(text),
            _one_of("text", "voice", "phone", ""),
            _one_of("active", "ended", "timeout", "erased"),
            str,
            str,
            str,
            str,
            _moment,
            _moment,
            lambda text: text and _moment(text),
            whole,
            _object_decoder.decode,
            _object_decoder.decode,
            lambda text: _one_of("0", "1")(text) == "1",
            whole,
            whole,
        ),
        strict=True,
    )
)
"""How each field of HEADER, but for the format, is read. What lua/begin leaves to be looked at is looked at here: Redis
has no time to spare."""

FORMAT = 1
"""Version of the key and value formats, recorded in `gw:meta`, each session hash and each outbox record."""
