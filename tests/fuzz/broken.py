"""Bodies and requests that are almost right: valid ones, broken in the ways of which attackers and bad clients know."""

import json
from collections.abc import Callable
from random import Random
from typing import Any

ODD_TEXT = [
    "",
    "\0",
    "a\0b",
    "\ud800",
    "\udc00\ud800",
    "\ufffe\uffff",
    "\u202e",
    "🙂" * 50,
    "a" * 40_000,
    "\x1b[2J",
    "'; --",
    "\\u0000",
]
ODD_VALUES: list[Any] = [
    None, True, 0, -1, 1.5, 2**31, 2**63, 2**64, 10**400, -(10**30), 1e308, float("nan"), float("inf"), [], {}, [[]], "",
    {"a": {"b": {"c": "\0"}}}, {"\0": 1}, ["\ud800"], {"website_domain": "\0.example"}, {"user_agent": "\0"}, {"": ""},
]  # fmt: skip
ODD_BYTES = [
    b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\xef\xbb\xbf", b"\\u0000", b"\\ud800", b"NaN", b"Infinity", b"1e400", b"9" * 5000,
    b"[" * 2000, b'{"a":' * 2000, b'"', b"\\", b",", b":", b"}", b"/*", b"\xc0\x80", b"\xf4\x90\x80\x80", b"\r\n\r\n",
]  # fmt: skip
FIELDS = [
    "message", "session_id", "metadata", "message_id", "channel", "audio_url", "audio_duration_ms", "if_busy", "agent_id",
    "user_token", "graph", "config", "allowed_domains", "channels", "history_window", "rate_limit", "unheard_of",
]  # fmt: skip
METHODS = [b"GET", b"POST", b"PUT", b"DELETE", b"HEAD", b"OPTIONS", b"PATCH", b"TRACE", b"CONNECT", b"get", b"X"]
PATHS = [
    b"/api/chat/shop/message", b"/api/sessions/" + b"%00" * 16, b"/%", b"/%zz", b"/a%2e%2e/b", b"*", b"//healthz", b"/docs",
    b"/api/sessions/stats?agent_id=%ff&agent_id=%00", b"/api/sessions?limit=1&limit=2", b"/api/sessions?cursor=%ff%fe",
    b"http://other.example/healthz", b"/healthz?" + b"a" * 3000, b"/api/chat/%E2%98%83/message", b"/openapi.json",
    b"/api/sessions/session_1234567890_abc/messages?before=1e9", b"/api/agents/%2e%2e", b"/" + b"a" * 9000, b"/\xff",
]  # fmt: skip
NAMES = [b"X-A", b"Origin", b"User-Agent", b"Authorization", b"Last-Event-ID", b"Idempotency-Key", b"Cookie"]
VALUES = [
    b"", b"a", b"\xe4\xff", b"null", b"https://\xff", b"Bearer \xff\xfe", b"9" * 400 + b"-1", b"a\tb", b'"', b"x" * 20_000,
]  # fmt: skip
FRAMINGS = [
    [], [b"Content-Length: 2"], [b"Content-Length: 2", b"Content-Length: 3"], [b"Content-Length: -1"],
    [b"Content-Length: 1e3"],
    [b"Transfer-Encoding: chunked"], [b"Transfer-Encoding: chunked", b"Content-Length: 2"], [b"Transfer-Encoding: gzip"],
    [b"Content-Length: " + b"9" * 22], [b"Expect: 100-continue", b"Content-Length: 2"],
    [b"Upgrade: websocket", b"Connection: upgrade"], [b"Content-Encoding: gzip", b"Content-Length: 2"],
]  # fmt: skip
BODIES = [b"{}", b"2\r\n{}\r\n0\r\n\r\n", b"zz\r\n", b"0\r\nX-Forwarded-For: 1.2.3.4\r\nX: y\r\n\r\n", b""]
VERSIONS = [b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.1", b"HTTP/1.0", b"HTTP/2.0", b"HTTP/9", b""]
AGENTS = ["bank", "post", "mill"]


class Breaker:
    """Makes broken requests from a seed, always the same."""

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._number = 0

    def target(self) -> tuple[str, str, dict[str, Any]]:
        """A call with a body, and one that is right for it."""
        self._number += 1
        session_id = f"session_{1_800_000_000_000 + self._number}_fuzz"
        said: dict[str, Any] = {
            "message": f"Hello {self._number}",
            "session_id": session_id,
            "message_id": f"m{self._number}",
        }
        said |= {"metadata": {"website_domain": "shop.example", "page": {"path": "/a", "seen": [1, 2.5, None]}}}
        kind = self._random.random()
        if kind < 0.75:
            return "POST", "/api/chat/shop/message", said
        if kind < 0.8:
            return "POST", "/api/chat/shop/stream", said
        if kind < 0.9:
            return "POST", "/api/sessions", {"agent_id": "shop", "session_id": session_id, "metadata": {"page": "/"}}
        if kind < 0.93:
            return "POST", "/api/chat/shop/cancel", {"session_id": session_id}
        return "PUT", f"/api/agents/{self._random.choice(AGENTS)}", {"graph": "echo", "config": {"delay_ms": 0}}

    def body(self, valid: dict[str, Any]) -> bytes:
        """A valid body, broken in one to three ways, or one in eight as it is."""
        choose = self._random.choice
        raw = json.dumps(self._swapped(valid) if self._random.random() < 0.5 else valid, ensure_ascii=choose([True, False]))
        broken = raw.encode("utf-8", "surrogatepass")
        ways: list[Callable[[bytes], bytes]] = [
            self._flip, self._cut, self._insert, self._repeat, self._twice, self._nest, self._encode, self._splice,
        ]  # fmt: skip
        for _ in range(choose([0, 0, 1, 1, 1, 2, 3])):
            broken = choose(ways)(broken)
        return broken

    def _swapped(self, valid: dict[str, Any]) -> dict[str, Any]:
        fields = dict(valid)
        for _ in range(self._random.choice([1, 1, 2])):
            name = self._random.choice([*valid, self._random.choice(FIELDS)])
            if self._random.random() < 0.15:
                fields.pop(name, None)
            else:
                fields[name] = self._random.choice([*ODD_VALUES, *ODD_TEXT, {"x": self._random.choice(ODD_TEXT)}])
        return fields

    def _at(self, raw: bytes) -> int:
        return self._random.randrange(len(raw) + 1)

    def _flip(self, raw: bytes) -> bytes:
        changed = bytearray(raw or b" ")
        for _ in range(self._random.choice([1, 1, 4])):
            changed[self._random.randrange(len(changed))] ^= 1 << self._random.randrange(8)
        return bytes(changed)

    def _cut(self, raw: bytes) -> bytes:
        return raw[: self._at(raw)]

    def _insert(self, raw: bytes) -> bytes:
        at = self._at(raw)
        return raw[:at] + self._random.choice(ODD_BYTES) + raw[at:]

    def _repeat(self, raw: bytes) -> bytes:
        at = self._at(raw)
        return raw[:at] + raw[at : at + self._random.randrange(1, 30)] * self._random.choice([2, 50]) + raw[at:]

    def _twice(self, raw: bytes) -> bytes:
        name = self._random.choice(FIELDS[:4]).encode()
        return raw[:-1] + b', "' + name + b'": ' + self._random.choice([b'"twice"', b"1", b"{}"]) + b"}"

    def _nest(self, raw: bytes) -> bytes:
        depth = self._random.choice([3, 15, 17, 63, 65, 500, 1100, 20_000])
        return raw[:-1] + b', "metadata": {"a": ' + b"[" * depth + b"]" * depth + b"}}"

    def _encode(self, raw: bytes) -> bytes:
        return raw.decode("utf-8", "replace").encode(
            self._random.choice(["utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7"])
        )

    def _splice(self, raw: bytes) -> bytes:
        return raw.replace(b'"Hello', b'"' + self._random.choice([b"\\u0000", b"\\ud83d", b"\0", b"\xff", b"\\u0001"]), 1)

    def request(self) -> bytes:
        """A whole request whose head is broken."""
        choose = self._random.choice
        line = b"%b %b %b\r\nHost: a\r\n" % (choose(METHODS), choose(PATHS), choose(VERSIONS))
        field = b"%b: %b\r\nContent-Type: application/json\r\n" % (choose(NAMES), choose(VALUES))
        framing = b"".join(part + b"\r\n" for part in choose(FRAMINGS))
        raw = line + field + framing + b"\r\n" + choose(BODIES)
        for _ in range(choose([0, 0, 1, 2])):
            raw = choose([self._flip, self._cut, self._insert, self._repeat])(raw)
        return raw
