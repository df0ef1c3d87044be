"""Parameters of paths and headers as the reference describes them: those that no type names."""

from typing import Any

import msgspec

from gateway.turns.request import SessionId

_TEXT = {"type": "string"}

PATH_PARAMETERS: dict[str, dict[str, Any]] = {
    "agent_id": {
        "description": "The agent's UUID or its name",
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,100}$"},
    },
    "session_id": {"description": "The session's id", "schema": msgspec.json.schema(SessionId)},
    "turn_id": {
        "description": "The turn's UUID, from `turn.started` or an answer's metadata",
        "schema": {"type": "string", "format": "uuid"},
    },
    "version": {
        "description": "The version of the widget that `/widget.js` names; another one redirects to it",
        "schema": {"type": "string", "minLength": 1},
    },
    "folder": {"description": "The module's folder", "schema": {"type": "string", "minLength": 1}},
    "file": {"description": "The module's file name", "schema": {"type": "string", "minLength": 1}},
}
HEADER_PARAMETERS: dict[str, dict[str, Any]] = {
    "Idempotency-Key": {
        "description": "Stands for `message_id` where the body has none: makes a retry safe",
        "schema": {"type": "string", "pattern": '^(?:[A-Za-z0-9_.:-]{1,128}|"[A-Za-z0-9_.:-]{1,128}")$'},
    },
    "Last-Event-ID": {
        "description": "The id of the last event that was received; the stream goes on behind it",
        "schema": {"type": "string", "pattern": "^([0-9]{1,15}-[0-9]{1,16})?$"},
    },
    "X-User-Token": {
        "description": "A JWT with which the agent's site says who its visitor is, as `user_token` in bodies",
        "schema": _TEXT,
    },
    "If-None-Match": {"description": "The ETag of the client's copy: 304 if it is still good", "schema": _TEXT},
}
RESPONSE_HEADERS: dict[str, dict[str, Any]] = {
    "Retry-After": {"description": "Seconds after which to try again", "schema": {"type": "integer", "minimum": 1}},
    "WWW-Authenticate": {"description": "What kind of credentials are needed", "required": True, "schema": _TEXT},
    "RateLimit": {
        "description": "What the client's address and session have left: `r` messages, all of them back after `t` seconds",
        "schema": _TEXT,
    },
    "RateLimit-Policy": {"description": "Their limits: `q` messages in `w` seconds", "schema": _TEXT},
    "ETag": {"description": "Names this version of the file", "required": True, "schema": _TEXT},
    "Cache-Control": {"description": "How long the answer may be kept", "required": True, "schema": _TEXT},
    "Location": {"description": "Where the file is now", "required": True, "schema": _TEXT},
}
