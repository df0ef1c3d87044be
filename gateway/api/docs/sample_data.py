"""The made-up ids, tokens, times and documents of the examples."""

from typing import Any

from gateway.api.docs.example import StreamEvent

AGENT_ID = "0196b6a2-5c1e-7d31-9a55-3f0c7a1e2b4d"
SESSION_ID = "gs_Kq3vJ8mZt2YxW5nRb7LcDf9HsPgEu4Ta"
TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzaWQiOiJnc19LcTMifQ.b8Yx0f2kQ1"  # noqa: S105 (no key signed it)
TURN_ID = "0196b6a3-1f42-7b0e-8c6d-52a9e4d7f310"
STREAMED_TURN_ID = "0196b6a3-77d0-7c55-b1f4-0a6be8c2d911"
CANCELLED_TURN_ID = "0196b6a4-0b8e-7e21-94d3-c7f15a60b822"
STARTED_AT, ANSWERED_AT = "2026-11-27T09:30:00.000Z", "2026-11-27T09:31:12.345Z"
VERSION = "5d41402abc4b2a76"
SHOP = {"Origin": "https://shop.example"}


def problem(status: int, code: str, title: str, detail: str = "", **more: Any) -> dict[str, Any]:
    """A problem document."""
    return {
        "type": f"urn:gateway:problem:{code}",
        "title": title,
        "status": status,
        "code": code,
        "detail": detail or title,
        "request_id": "0196b6a5-3c07-7a98-8e12-6d4b90f1a2c3",
        **more,
    }


DEFINITION = {"graph": "echo", "config": {"chunks": 3}, "allowed_domains": ["shop.example", "*.shop.example"]}
AGENT = {
    "id": AGENT_ID,
    "name": "support",
    **DEFINITION,
    "channels": ["text", "voice", "phone"],
    "history_window": 50,
    "hot_ttl_s": 1800,
    "turn_timeout_s": 60,
    "if_busy": "queue",
    "rate_limit": {"messages": 30, "per_s": 60},
    "agent_rate_limit": None,
    "domain_rate_limit": None,
    "max_running_turns": None,
    "turns_per_day": None,
    "require_token": False,
    "site_keys": [],
    "require_identity": False,
    "active": True,
    "truncate_ip": False,
    "retention_days": None,
}
SLOW = {**DEFINITION, "config": {"delay_ms": 5000}, "retention_days": 90}
OPENED = {
    "session_id": SESSION_ID,
    "session_token": TOKEN,
    "agent_id": AGENT_ID,
    "channel": "text",
    "status": "active",
    "started_at": STARTED_AT,
}
SESSION: dict[str, Any] = {
    "session_id": SESSION_ID,
    "agent_id": AGENT_ID,
    "channel": "text",
    "status": "active",
    "user_id": None,
    "website_domain": "shop.example",
    "started_at": STARTED_AT,
    "last_activity_at": ANSWERED_AT,
    "ended_at": None,
    "message_count": 4,
    "context": {},
}
QUESTION = {"message": "Do you deliver to Ghent?", "session_id": SESSION_ID, "message_id": "m-1"}
ANSWER: dict[str, Any] = {
    "response": "You said: Do you deliver to Ghent?",
    "metadata": {
        "history": 0,
        "session_id": SESSION_ID,
        "turn_id": TURN_ID,
        "message_count": 2,
        "latency_ms": 12,
        "replayed": False,
    },
}
STREAM = (
    StreamEvent(
        "2-1", "turn.started", {"turn_id": STREAMED_TURN_ID, "session_id": SESSION_ID, "message": "And to Bruges, too?"}
    ),
    StreamEvent("2-2", "text.delta", {"text": "You said:"}),
    StreamEvent("2-3", "text.delta", {"text": " And to Br"}),
    StreamEvent("2-4", "text.delta", {"text": "uges, too?"}),
    StreamEvent(
        "2-5",
        "turn.completed",
        {
            "response": "You said: And to Bruges, too?",
            "metadata": {
                "history": 2,
                "session_id": SESSION_ID,
                "turn_id": STREAMED_TURN_ID,
                "message_count": 4,
                "latency_ms": 18,
                "replayed": False,
            },
        },
    ),
)
AT_AGENT = {"agent_id": "support"}
AT_SESSION: dict[str, Any] = {"session_id": SESSION_ID}
