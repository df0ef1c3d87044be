"""Every error a client can meet: code, status and title are stated here and nowhere else.

Rendered as `application/problem+json` (RFC 9457) by `api/answers.py`.
"""

import re
from collections.abc import Mapping
from typing import Annotated

import msgspec
from msgspec import Meta

from persistence.errors import Damaged, DataRefused, NotReplicated, PersistenceError, PostgresUnavailable, RedisUnavailable

_encoder = msgspec.json.Encoder()


class Problem(Exception):
    """Something went wrong in the gateway."""

    status = 500
    code = "internal_error"
    title = "Something went wrong in the gateway"
    retryable = False

    def __init__(
        self,
        detail: str = "",
        *,
        retry_after_s: float | None = None,
        field: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail or self.title)
        self.detail = detail
        self.retry_after_s = retry_after_s
        self.field = field
        self.headers = headers or {}


class InvalidRequest(Problem):
    status, code, title = 400, "invalid_request", "This is not an HTTP request that can be read"


class InvalidJson(Problem):
    status, code, title = 400, "invalid_json", "The body is not JSON in UTF-8"


class InvalidField(Problem):
    status, code, title = 422, "invalid_field", "A field is missing or wrong"


class HeadTooSlow(Problem):
    status, code, title, retryable = 408, "head_too_slow", "The request's head came too slowly", True


class BodyTooSlow(Problem):
    status, code, title, retryable = 408, "body_too_slow", "The body came too slowly", True


class BodyTooLarge(Problem):
    status, code, title = 413, "body_too_large", "The body is too large"


class UriTooLong(Problem):
    status, code, title = 414, "uri_too_long", "The address is too long"


class UnsupportedMediaType(Problem):
    status, code, title = 415, "unsupported_media_type", "The body is not application/json in UTF-8, as it is"


class HeadTooLarge(Problem):
    status, code, title = 431, "head_too_large", "The request's head is too large"


class NotFound(Problem):
    status, code, title = 404, "not_found", "There is nothing at this address"


class MethodNotAllowed(Problem):
    status, code, title = 405, "method_not_allowed", "This address does not know that method"


class AgentNotFound(Problem):
    status, code, title = 404, "agent_not_found", "There is no such agent"


class SessionNotFound(Problem):
    status, code, title = 404, "session_not_found", "There is no such session"


class TokenRequired(Problem):
    status, code, title = 401, "session_token_required", "This session needs its token"


class TokenInvalid(Problem):
    status, code, title = 401, "session_token_invalid", "The session token is not valid for this session"


class UserTokenInvalid(Problem):
    status, code, title = 401, "user_token_invalid", "The user token cannot be verified"
    expired_user: object = None
    """The user whom a valid but expired token named."""


class IdentityRequired(Problem):
    status, code, title = 401, "identity_required", "This agent answers known users only: a user token is needed"


class AdminKeyRequired(Problem):
    status, code, title = 401, "admin_key_required", "This call needs the admin key"


class TlsRequired(Problem):
    status, code, title = 403, "tls_required", "The admin key is taken over TLS only, or from the machine itself"


class DomainNotAllowed(Problem):
    status, code, title = 403, "domain_not_allowed", "This website may not use the agent"


class ChannelNotAllowed(Problem):
    status, code, title = 403, "channel_not_allowed", "The agent does not answer on this channel"


class AgentInactive(Problem):
    status, code, title = 403, "agent_inactive", "The agent is switched off"


class SessionEnded(Problem):
    status, code, title = 410, "session_ended", "The session has ended"


class SessionErased(Problem):
    status, code, title = 410, "session_erased", "The session has been erased"


class TurnNotFound(Problem):
    status, code, title = 404, "turn_not_found", "There is no such turn"


class NoTurnRunning(Problem):
    status, code, title = 409, "no_turn_running", "Nothing is being answered"


class TurnCancelled(Problem):
    status, code, title = 409, "turn_cancelled", "The answer was cancelled"


class TurnInProgress(Problem):
    status, code, title, retryable = 409, "turn_in_progress", "Another message is being answered", True


class TurnSuperseded(Problem):
    status, code, title, retryable = 409, "turn_superseded", "The session was taken over before the answer was stored", True


class NameTaken(Problem):
    status, code, title = 409, "name_taken", "Another agent has this name"


class MessageIdReused(Problem):
    status, code, title = 422, "message_id_reused", "This message_id was used for another message"


class RateLimited(Problem):
    status, code, title, retryable = 429, "rate_limited", "Too many messages", True


class QueueFull(Problem):
    status, code, title, retryable = 429, "queue_full", "Too many messages wait for this session", True


class AgentBusy(Problem):
    status, code, title, retryable = 429, "agent_busy", "The agent answers as many messages as it may at a time", True


class QuotaExhausted(Problem):
    status, code, title, retryable = 429, "quota_exhausted", "The agent has answered all it may today", True


class TooManyStreams(Problem):
    status, code, title, retryable = 429, "too_many_streams", "Too many streams are open", True


class LimitsUnavailable(Problem):
    status, code, title, retryable = 503, "limits_unavailable", "Limits cannot be looked at just now", True


class GraphFailed(Problem):
    status, code, title, retryable = 502, "graph_failed", "The agent failed", True


class GraphInvalidOutput(Problem):
    status, code, title = 502, "graph_invalid_output", "The agent gave no usable answer"


class TurnTimeout(Problem):
    status, code, title, retryable = 504, "turn_timeout", "The agent took too long", True


class GraphNotConfigured(Problem):
    status, code, title = 503, "graph_not_configured", "The agent's graph is not configured on this server"


class RedisDown(Problem):
    status, code, title, retryable = 503, "redis_unavailable", "Sessions cannot be reached just now", True


class TooFewReplicas(Problem):
    status, code, title, retryable = 503, "not_replicated", "Too few copies of the answer could be kept just now", True


class PostgresDown(Problem):
    status, code, title, retryable = 503, "postgres_unavailable", "Stored sessions cannot be reached just now", True


class BacklogFull(Problem):
    status, code, title, retryable = 503, "backlog_full", "Too much waits to be stored", True


class Draining(Problem):
    status, code, title, retryable = 503, "draining", "This server is shutting down", True


class SessionDamaged(Problem):
    status, code, title = 500, "session_damaged", "The stored session cannot be read"


def problem_of(error: PersistenceError) -> Problem:
    """The problem that stands for a failure of the stores, whose text may quote stored data and stays in the log."""
    match error:
        case NotReplicated():
            return TooFewReplicas(retry_after_s=1)
        case RedisUnavailable():
            return RedisDown(retry_after_s=1)
        case PostgresUnavailable():
            return PostgresDown(retry_after_s=2)
        case Damaged():
            return SessionDamaged()
        case DataRefused():
            return InvalidField("Postgres cannot store this")
        case _:
            return Problem()


_FIELD = re.compile(r"^(?P<what>.*?)(?: - at `(?:key in )?\$(?P<where>.*?)`)?$", re.DOTALL)


def invalid_field(error: msgspec.ValidationError) -> InvalidField:
    """The problem that names the field of a validation error."""
    match = _FIELD.match(str(error))
    what, where = (match["what"], match["where"] or "") if match else (str(error), "")
    # The value itself is not repeated: it may be a secret that was put into the wrong field.
    what = "Invalid enum value" if what.startswith("Invalid enum value") else what
    where = re.sub(r"\[(\d+)\]", r".\1", where.replace("[...]", ""))
    named = re.search(r"field `([^`]+)`", what)
    field = ".".join(part for part in (where.lstrip("."), named[1] if named else "") if part) or "body"
    return InvalidField(f"{field}: {what[0].lower()}{what[1:]}", field=field)


SHOWN_CHARS = 500
"""Longest client-supplied text echoed in a problem."""

NO_STORE = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class ProblemDocument(msgspec.Struct, omit_defaults=True):
    """An error, after RFC 9457."""

    type: Annotated[str, Meta(description="`urn:gateway:problem:` and the code")]
    title: Annotated[str, Meta(description="What happened, in a sentence that is the same for every problem of this code")]
    status: Annotated[int, Meta(description="The HTTP status")]
    code: Annotated[str, Meta(description="What happened, for programs")]
    detail: Annotated[str, Meta(description="What happened this time, for people; the title where there is no more to say")]
    request_id: Annotated[str, Meta(description="Names this request in the gateway's log")]
    retryable: Annotated[bool, Meta(description="Whether the same request may succeed later")] = False
    retry_after: Annotated[float | None, Meta(description="Seconds to wait before that, as the header `Retry-After`")] = None
    field: Annotated[str | None, Meta(description="The field, parameter or header that is wrong")] = None


def encode_problem(problem: Problem, request_id: str) -> bytes:
    """A problem as JSON. `request_id` names the request in the log."""
    document = ProblemDocument(
        type=f"urn:gateway:problem:{problem.code}",
        title=problem.title,
        status=problem.status,
        code=problem.code,
        detail=_cut(problem.detail) or problem.title,
        request_id=request_id,
        retryable=problem.retryable,
        retry_after=_retry_after(problem),
        field=None if problem.field is None else _cut(problem.field),
    )
    return _encoder.encode(document)


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}…"


def problem_headers(problem: Problem) -> dict[str, str]:
    """The headers of a problem, without its Content-Type."""
    headers = {**NO_STORE, **problem.headers}
    retry_after = _retry_after(problem)
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    if problem.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return headers


def _retry_after(problem: Problem) -> int | None:
    return None if problem.retry_after_s is None else max(1, -int(-problem.retry_after_s // 1))
