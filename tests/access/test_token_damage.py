"""Session tokens are verified by a function of our own, for its speed: PyJWT must agree with it about damaged ones."""

from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Callable
from time import time
from typing import Any

import jwt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.access import tokens as tokens_module
from gateway.access.tokens import SessionToken, SessionTokens

TTL_S = 12 * 3600
"""Hours: these tokens are made when the tests are collected, and a whole run takes minutes."""
KEYS = ["k" * 32, "o" * 32]
TOKEN = SessionToken("session_1234567890_abc", "01900000-0000-7000-8000-000000000000", "shop.example", "user-7")
TOKENS = SessionTokens(KEYS, TTL_S)
MINTED = [SessionTokens([key], TTL_S).mint(TOKEN) for key in KEYS]
# As an earlier version minted them: without the name of the key.
UNNAMED = [jwt.encode(jwt.decode(text, key, ["HS256"]), key) for text, key in zip(MINTED, KEYS, strict=True)]
FOREIGN = [
    SessionTokens(["f" * 32], TTL_S).mint(TOKEN),
    jwt.encode({"sid": "x", "exp": int(time()) + TTL_S}, KEYS[0]),
    jwt.encode({"sid": "x" * 16, "aid": "a", "dom": "d", "exp": int(time()) - 600}, KEYS[0]),
    jwt.encode({"sid": "x" * 16, "aid": "a", "dom": "d", "exp": int(time()) + TTL_S}, None, "none"),
    jwt.encode({"sid": "x" * 16, "aid": "a", "dom": "d", "exp": int(time()) + TTL_S}, KEYS[0] * 2, "HS512"),
]
ALPHABET = "abcXYZ019-_.=+/ \n\x00\u00e9"
Damage = Callable[[str], str]


def by_the_library(text: str) -> dict[str, Any] | None:
    """The claims of a token by PyJWT alone, with the key that the token names, or with any when it names none."""
    try:
        kid = jwt.get_unverified_header(text).get("kid")
    except (jwt.PyJWTError, ValueError):
        return None
    for key in KEYS:
        named = jwt.get_unverified_header(SessionTokens([key], TTL_S).mint(TOKEN))["kid"]
        if kid in (None, named):
            try:
                claims = jwt.decode(text, key, ["HS256"], options={"require": ["sid", "aid", "dom", "exp"]})
            except (jwt.PyJWTError, ValueError, OverflowError):
                continue
            return dict(claims)
    return None


def is_canonical(text: str) -> bool:
    """Whether each part of a token is base64url without padding (RFC 7515, section 2). Python's decoder passes over more."""
    try:
        parts = [part.encode() for part in text.split(".")]
    except UnicodeEncodeError:
        return False
    return all(urlsafe_b64encode(urlsafe_b64decode(part + b"==")).rstrip(b"=") == part for part in parts)


def check(text: str) -> None:
    """Both refuse a token, or both say the same of it; ours alone refuses what is not written canonically."""
    ours, library = TOKENS.verify(text), by_the_library(text)
    if ours is not None:
        assert library is not None, text
        assert (ours.session_id, ours.agent_id, ours.website_domain) == (library["sid"], library["aid"], library["dom"])
        assert ours.user_id == library.get("uid", "")
    else:
        assert library is None or not is_canonical(text), text


@st.composite
def damaged(draw: st.DrawFn) -> str:
    """A token with up to three kinds of damage."""
    texts = st.sampled_from([*MINTED, *UNNAMED, *FOREIGN])
    text = draw(texts)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(text)))
        kind = draw(st.sampled_from(("replace", "insert", "cut", "drop", "case", "splice", "double", "pad")))
        if kind == "replace":
            text = text[:at] + draw(st.sampled_from(ALPHABET)) + text[at + 1 :]
        elif kind == "insert":
            text = text[:at] + draw(st.text(ALPHABET, min_size=1, max_size=4)) + text[at:]
        elif kind == "cut":
            text = text[:at]
        elif kind == "drop":
            text = text[:at] + text[at + draw(st.integers(1, 9)) :]
        elif kind == "case":
            text = text[:at] + text[at:].swapcase()
        elif kind == "splice":
            # A part of one token beside parts of another.
            parts, others = text.split("."), draw(texts).split(".")
            number = draw(st.integers(0, 2))
            text = ".".join((others if i == number else parts)[i] for i in range(min(len(parts), len(others), 3)))
        elif kind == "double":
            text = text + "." + text
        else:
            text = text + "=" * draw(st.integers(1, 3))
    return text


@settings(max_examples=5000, deadline=None)
@given(damaged())
def test_the_library_agrees_about_damaged_tokens(text: str) -> None:
    check(text)


def test_the_library_agrees_about_every_single_change_of_a_character() -> None:
    text = MINTED[0]
    for at in range(len(text)):
        for other in "AQgw-.":
            check(text[:at] + other + text[at + 1 :])


@pytest.mark.parametrize("text", [*MINTED, *UNNAMED])
def test_a_whole_token_is_good_to_both(text: str) -> None:
    """The control: agreement is not that both refuse everything."""
    assert TOKENS.verify(text) == TOKEN
    assert by_the_library(text) is not None


def test_without_the_comparison_they_disagree(monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a verification that takes any signature is found."""
    monkeypatch.setattr(tokens_module, "compare_digest", lambda *_: True)
    with pytest.raises(AssertionError):
        check(MINTED[0][:-1])
