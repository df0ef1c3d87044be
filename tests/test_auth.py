"""Tokens, the admin key, website domains: what opens a door and what does not."""

from time import time
from typing import Any

import jwt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.auth import SessionToken, SessionTokens, domain_allowed, normal_domain, origin_domain

KEY, OTHER_KEY = "k" * 32, "o" * 32
TOKEN = SessionToken("session_1234567890_abc", "01900000-0000-7000-8000-000000000000", "shop.example")
CLAIMS: dict[str, Any] = {"sid": TOKEN.session_id, "aid": TOKEN.agent_id, "dom": TOKEN.website_domain}


def signed(claims: dict[str, Any], key: str = KEY, algorithm: str = "HS256") -> str:
    return jwt.encode(claims, key, algorithm)


def test_a_token_says_what_was_put_into_it() -> None:
    tokens = SessionTokens([KEY], 60)
    assert tokens.verify(tokens.mint(TOKEN)) == TOKEN


def test_a_token_of_the_previous_key_is_good_and_new_ones_are_signed_with_the_new_key() -> None:
    old, both, new = SessionTokens([OTHER_KEY], 60), SessionTokens([KEY, OTHER_KEY], 60), SessionTokens([KEY], 60)
    assert both.verify(old.mint(TOKEN)) == TOKEN
    assert new.verify(both.mint(TOKEN)) == TOKEN
    assert new.verify(old.mint(TOKEN)) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a.b.c",
        "..",
        "\u00e4.\u00e4.\u00e4",
        signed(CLAIMS | {"exp": int(time()) - 1}),
        signed(CLAIMS),
        signed({name: CLAIMS[name] for name in ("sid", "aid")} | {"exp": int(time()) + 60}),
        signed(CLAIMS | {"exp": int(time()) + 60}, OTHER_KEY),
        signed(CLAIMS | {"exp": int(time()) + 60}, "k" * 64, "HS512"),
        jwt.encode(CLAIMS | {"exp": int(time()) + 60}, None, "none"),
        signed(CLAIMS | {"exp": "never"}),
    ],
    ids=["empty", "no JWT", "dots", "no ASCII", "expired", "without an end", "without a domain", "another key",
         "another algorithm", "no signature", "a word for an end"],
)  # fmt: skip
def test_what_is_no_good_token_says_nothing(text: str) -> None:
    assert SessionTokens([KEY], 60).verify(text) is None


def test_a_token_that_was_changed_says_nothing() -> None:
    tokens = SessionTokens([KEY], 60)
    head, claims, signature = tokens.mint(TOKEN).split(".")
    _, others, _ = tokens.mint(SessionToken("session_1234567890_xyz", TOKEN.agent_id, TOKEN.website_domain)).split(".")
    assert tokens.verify(f"{head}.{claims}.{signature}") == TOKEN
    assert tokens.verify(f"{head}.{others}.{signature}") is None


@pytest.mark.parametrize(
    ("origin", "domain"),
    [
        ("https://Shop.Example", "shop.example"),
        ("https://shop.example.:8443", "shop.example"),
        ("http://127.0.0.1:8000", "127.0.0.1"),
        ("http://[::1]:8000", "::1"),
        ("https://user@shop.example", "shop.example"),
        ("null", ""),
        ("", ""),
        ("shop.example", ""),
        ("https://[shop.example", ""),
        ("file://", ""),
    ],
)
def test_the_domain_of_an_origin_is_its_host(origin: str, domain: str) -> None:
    assert origin_domain(origin) == domain


def test_a_list_without_entries_allows_any_website_and_none() -> None:
    assert domain_allowed("shop.example", [])
    assert domain_allowed("", [])


@pytest.mark.parametrize(
    ("domain", "allowed"),
    [
        ("shop.example", True),
        ("www.shop.example", False),
        ("a.chain.example", True),
        ("a.b.chain.example", True),
        ("chain.example", False),
        (".chain.example", False),
        ("evilchain.example", False),
        ("*.chain.example", True),
        ("chain.example.evil.example", False),
        ("", False),
    ],
)
def test_an_entry_is_an_exact_host_or_all_below_one(domain: str, allowed: bool) -> None:
    assert domain_allowed(domain, ["Shop.Example.", "*.chain.example"]) is allowed


@given(st.text(max_size=40), st.lists(st.text("*.abAB ", min_size=1, max_size=8), min_size=1, max_size=3))
def test_an_allowed_domain_is_one_of_the_list_or_ends_in_a_wildcards_rest(text: str, entries: list[str]) -> None:
    domain = normal_domain(text)
    patterns = [normal_domain(entry) for entry in entries]
    if domain_allowed(domain, entries) and domain not in patterns:
        assert any(pattern.startswith("*.") and domain.endswith(pattern[1:]) for pattern in patterns)


def test_an_unknown_website_is_never_allowed_by_a_list_that_has_entries() -> None:
    for entry in ("shop.example", "*.shop.example", "*.", "*", ".", " "):
        assert not domain_allowed("", [entry]), entry
