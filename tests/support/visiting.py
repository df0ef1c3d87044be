"""What tests say to a pod over HTTP, and what they check of every answer that is an error."""

from collections.abc import Awaitable, Callable
from itertools import count
from typing import Any

import httpx

Flush = Callable[[], Awaitable[None]]
Rows = Callable[..., Awaitable[list[Any]]]

_numbers = count(1)


def new_session_id() -> str:
    """An id as a browser makes one up, another one at every call."""
    return f"session_{1_700_000_000_000 + next(_numbers)}_abc123xyz"


async def post_message(
    client: httpx.AsyncClient,
    session_id: str,
    message: str = "Hello",
    *,
    agent: str = "shop",
    headers: dict[str, str] | None = None,
    **fields: Any,
) -> httpx.Response:
    """Sends a message; the answer, whatever it is."""
    body = {"message": message, "session_id": session_id, **fields}
    return await client.post(f"/api/chat/{agent}/message", json=body, headers=headers)


async def say(client: httpx.AsyncClient, session_id: str, message: str = "Hello", **options: Any) -> dict[str, Any]:
    """Sends a message that must be answered; the answer's JSON."""
    answer = await post_message(client, session_id, message, **options)
    assert answer.status_code == 200, answer.text
    answered: dict[str, Any] = answer.json()
    return answered


async def transcript(client: httpx.AsyncClient, session_id: str, **parameters: Any) -> list[str]:
    """What has been said in a session, oldest first."""
    answer = await client.get(f"/api/sessions/{session_id}/messages", params=parameters)
    assert answer.status_code == 200, answer.text
    return [message["content"] for message in answer.json()["messages"]]


def problem(answer: httpx.Response, status: int, code: str, field: str | None = None) -> dict[str, Any]:
    """Checks that an answer is a problem document (RFC 9457) with this status and code; the document."""
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json"), answer.text
    document: dict[str, Any] = answer.json()
    assert {"type", "title", "status", "code", "detail", "request_id"} <= document.keys()
    assert (document["status"], document["code"]) == (status, code), document
    assert document["type"] == f"urn:gateway:problem:{code}"
    assert all(document[name] for name in ("title", "detail", "request_id"))
    assert document.get("field") == field, document
    return document
