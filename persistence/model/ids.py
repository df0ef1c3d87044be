"""Ids: UUIDs, and session ids as logs may show them."""

from uuid import UUID


def masked(session_id: str) -> str:
    """A session id as logs may show it: enough to find it with redis-cli, too little to use it."""
    return f"{session_id[:-10]}…" if len(session_id) > 20 else "…"


def as_uuid(reference: str) -> str | None:
    """The canonical form of a UUID, or None if it is a name."""
    try:
        return str(UUID(reference))
    except ValueError:
        return None
