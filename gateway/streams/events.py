"""The events of a turn, their cursors, and the data that several of them carry."""

from typing import Any

from persistence.model.session import Turn

TERMINAL = frozenset(("turn.completed", "turn.failed", "turn.cancelled"))

Cursor = tuple[int, int]


def answer_metadata(turn: Turn, session_id: str, *, replayed: bool) -> dict[str, Any]:
    """The metadata of a turn's answer: what the graph returned, and what the gateway adds."""
    return {
        **turn.metadata,
        "session_id": session_id,
        "turn_id": turn.id,
        "message_count": turn.seq + len(turn.messages) - 1,
        "latency_ms": turn.messages[-1].latency_ms,
        "replayed": replayed,
    }


def turn_started(turn_id: str, session_id: str, message: str, message_id: str | None) -> dict[str, str]:
    """What `turn.started` says. The message is for who follows the session: the visitor's other devices."""
    said = {"turn_id": turn_id, "session_id": session_id, "message": message}
    return {**said, "message_id": message_id} if message_id else said


def parse_cursor(text: str | None) -> Cursor | None:
    """The cursor of a Last-Event-ID header, `<epoch>-<n>`. Raises ValueError."""
    if not text:
        return None
    epoch, separator, n = text.partition("-")
    if not separator or not epoch.isdecimal() or not n.isdecimal() or len(text) > 40:
        raise ValueError("Last-Event-ID is not <epoch>-<n>")
    return int(epoch), int(n)
