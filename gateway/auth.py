"""Who may do what: session tokens, website domains. The admin key is admin.py's."""

from collections.abc import Sequence
from time import time
from urllib.parse import urlsplit

import jwt
import msgspec

ALGORITHM = "HS256"


class SessionToken(msgspec.Struct, frozen=True):
    """What a token says: the session, its agent and its website domain."""

    session_id: str
    agent_id: str
    website_domain: str


class SessionTokens:
    """Signs and verifies session tokens (JWT, RFC 7519, HS256) with the first key; verifies with all of them."""

    def __init__(self, keys: Sequence[str], ttl_s: float) -> None:
        self._keys = keys
        self._ttl_s = ttl_s

    def mint(self, token: SessionToken) -> str:
        claims = {
            "sid": token.session_id,
            "aid": token.agent_id,
            "dom": token.website_domain,
            "exp": int(time() + self._ttl_s),
        }
        return jwt.encode(claims, self._keys[0], ALGORITHM)

    def verify(self, text: str) -> SessionToken | None:
        """What a token says, or None when it is not good (any more)."""
        for key in self._keys:
            try:
                claims = jwt.decode(text, key, algorithms=[ALGORITHM], options={"require": ["sid", "aid", "dom", "exp"]})
            except jwt.InvalidTokenError:
                continue
            return SessionToken(str(claims["sid"]), str(claims["aid"]), str(claims["dom"]))
        return None


def normal_domain(text: str) -> str:
    """A host name as it is stored and compared: lower case, no trailing dot, no longer than its column."""
    return text.strip().lower().rstrip(".")[:255]


def origin_domain(origin: str) -> str:
    """The host name of an Origin header; empty for `null` and for what is no origin."""
    try:
        return normal_domain(urlsplit(origin).hostname or "")
    except ValueError:
        return ""


def domain_allowed(domain: str, allowed: Sequence[str]) -> bool:
    """Whether a website may use an agent: an exact host or `*.example.com`; an empty list allows any."""
    if not allowed:
        return True
    if not domain:
        return False
    for pattern in map(normal_domain, allowed):
        if domain == pattern or (
            pattern.startswith("*.") and domain.endswith(pattern[1:]) and len(domain) > len(pattern) - 1
        ):
            return True
    return False
