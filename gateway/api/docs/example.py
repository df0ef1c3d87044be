"""One example of the reference: a request and its answer, and the request as a line for curl."""

import json
import shlex
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import msgspec

BASE = "http://127.0.0.1:8000"
"""Where `scripts/run` listens. The page puts its own address here."""
KEYS = {"admin": "$ADMIN_KEY", "session": "$SESSION_TOKEN"}
"""The variable that a curl line has for the key or token of each kind."""
COLUMNS = 62


class Example(msgspec.Struct, frozen=True, kw_only=True):
    """One request and its answer.

    `call` names an endpoint by method and path. `auth` is the key or token that goes along. `answer` is the answer's JSON,
    the events of a stream, or lines of a text. The answer to a `pending` example comes only after the next example.
    """

    call: str
    summary: str
    path: dict[str, str] = {}
    query: dict[str, str | int] = {}
    headers: dict[str, str] = {}
    auth: Literal["", "admin", "session"] = ""
    body: Any = None
    status: int = 200
    answer: Any = None
    answer_headers: dict[str, str] = {}
    pending: bool = False

    @property
    def url(self) -> str:
        """Path and query, ids put in."""
        where = self.call.partition(" ")[2].format_map(self.path)
        return where + ("?" + "&".join(f"{name}={value}" for name, value in self.query.items()) if self.query else "")


class StreamEvent(msgspec.Struct, frozen=True):
    """An event of an example: `id`, `event` and `data` as they are sent."""

    id: str
    event: str
    data: dict[str, Any]


def curl(example: Example) -> str:
    """The request as a command for a shell in which the variables of KEYS are set."""
    return " \\\n  ".join(_parts(example))


def _parts(example: Example) -> Iterator[str]:
    method = example.call.partition(" ")[0]
    flags = [*(["-N"] if is_stream(example.answer) else []), *([] if method == "GET" else ["-X", method])]
    yield " ".join(["curl", *flags, shlex.quote(BASE + example.url)])
    if example.auth:
        yield f'-H "Authorization: Bearer {KEYS[example.auth]}"'
    for name, value in example.headers.items():
        yield f"-H {shlex.quote(f'{name}: {value}')}"
    if example.body is not None:
        yield "-H 'Content-Type: application/json'"
        yield f"-d {shlex.quote(pretty(example.body))}"


def pretty(value: Any, indent: str = "") -> str:
    """JSON for reading: what fits is on one line."""
    line = json.dumps(value, ensure_ascii=False)
    if len(line) <= COLUMNS or not isinstance(value, (dict, list)):
        return line
    inner = f"{indent}  "
    named = value.items() if isinstance(value, dict) else [("", item) for item in value]
    parts = [f"{inner}{json.dumps(name) + ': ' if name else ''}{pretty(item, inner)}" for name, item in named]
    opening, closing = "{}" if isinstance(value, dict) else "[]"
    return "\n".join([opening, ",\n".join(parts), indent + closing])


def is_stream(answer: Any) -> bool:
    """Whether an example's answer is a stream of events."""
    return isinstance(answer, tuple)


def event_text(events: Sequence[StreamEvent]) -> str:
    """Events as they are sent (WHATWG HTML, section 9.2)."""
    return "".join(
        f"id: {event.id}\nevent: {event.event}\ndata: {json.dumps(event.data, ensure_ascii=False)}\n\n" for event in events
    )
