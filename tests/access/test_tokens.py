"""Session tokens, user tokens, the admin key: what opens a door and what does not."""

from time import time
from typing import Any

import jwt
import pytest

from gateway.access.tokens import MAX_USER_TOKEN_S, SessionToken, SessionTokens, fingerprint, is_one_of, read_user_token

KEY, OTHER_KEY = "k" * 32, "o" * 32
TOKEN = SessionToken("session_1234567890_abc", "01900000-0000-7000-8000-000000000000", "shop.example")
SOON = int(time()) + 12 * 3600
"""Hours ahead: these tokens are made when the tests are collected, and a whole run takes minutes."""
CLAIMS: dict[str, Any] = {"sid": TOKEN.session_id, "aid": TOKEN.agent_id, "dom": TOKEN.website_domain}


def signed(claims: dict[str, Any], key: str = KEY, algorithm: str = "HS256") -> str:
    return jwt.encode(claims, key, algorithm)


def headed(claims: dict[str, Any], key: str = KEY) -> str:
    """A token with the header of those that are given out with KEY."""
    kid = jwt.get_unverified_header(SessionTokens([KEY], 60).mint(TOKEN))["kid"]
    return jwt.encode(claims, key, "HS256", {"kid": kid})


def test_a_token_says_what_was_put_into_it() -> None:
    tokens = SessionTokens([KEY], 60)
    assert tokens.verify(tokens.mint(TOKEN)) == TOKEN


def test_a_token_of_the_previous_key_is_good_and_new_ones_are_signed_with_the_new_key() -> None:
    old, both, new = SessionTokens([OTHER_KEY], 60), SessionTokens([KEY, OTHER_KEY], 60), SessionTokens([KEY], 60)
    assert both.verify(old.mint(TOKEN)) == TOKEN
    assert new.verify(both.mint(TOKEN)) == TOKEN
    assert new.verify(old.mint(TOKEN)) is None


def test_a_token_that_was_good_is_not_when_its_time_is_over(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = SessionTokens([KEY], 60)
    text = tokens.mint(TOKEN)
    assert tokens.verify(text) == TOKEN
    monkeypatch.setattr("gateway.access.tokens.time", lambda: time() + 61)
    assert tokens.verify(text) is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a.b.c",
        "..",
        "\u00e4.\u00e4.\u00e4",
        signed(CLAIMS | {"exp": int(time()) - 1}),
        signed(CLAIMS),
        signed({name: CLAIMS[name] for name in ("sid", "aid")} | {"exp": SOON}),
        signed(CLAIMS | {"exp": SOON}, OTHER_KEY),
        signed(CLAIMS | {"exp": SOON}, "k" * 64, "HS512"),
        jwt.encode(CLAIMS | {"exp": SOON}, None, "none"),
        signed(CLAIMS | {"exp": "never"}),
        headed(CLAIMS | {"exp": int(time()) - 1}),
        headed(CLAIMS),
        headed({name: CLAIMS[name] for name in ("sid", "aid")} | {"exp": SOON}),
        headed(CLAIMS | {"exp": SOON}, OTHER_KEY),
        headed(CLAIMS | {"exp": "never"}),
        headed(CLAIMS | {"exp": SOON}).partition(".")[0],
        headed(CLAIMS | {"exp": SOON}).rpartition(".")[0],
        headed(CLAIMS | {"exp": SOON}).rpartition(".")[0] + ".",
        headed(CLAIMS | {"exp": SOON}) + "=",
        headed(CLAIMS | {"exp": SOON}) + ".",
    ],
    ids=["empty", "no JWT", "dots", "no ASCII", "expired", "without an end", "without a domain", "another key",
         "another algorithm", "no signature", "a word for an end", "own, expired", "own, without an end",
         "own, without a domain", "own, another key", "own, a word for an end", "own, no claims", "own, two parts",
         "own, an empty signature", "own, a padded signature", "own, four parts"],
)  # fmt: skip
def test_what_is_no_good_token_says_nothing(text: str) -> None:
    assert SessionTokens([KEY], 60).verify(text) is None


def test_a_token_that_was_changed_says_nothing() -> None:
    tokens = SessionTokens([KEY], 60)
    head, claims, signature = tokens.mint(TOKEN).split(".")
    _, others, _ = tokens.mint(SessionToken("session_1234567890_xyz", TOKEN.agent_id, TOKEN.website_domain)).split(".")
    assert tokens.verify(f"{head}.{claims}.{signature}") == TOKEN
    assert tokens.verify(f"{head}.{others}.{signature}") is None


def test_a_token_names_its_key_and_only_that_one_is_tried() -> None:
    token = SessionTokens([OTHER_KEY], 60).mint(TOKEN)
    kid = jwt.get_unverified_header(token)["kid"]
    assert SessionTokens([KEY, OTHER_KEY], 60).verify(token) == TOKEN
    misnamed = jwt.encode(CLAIMS | {"exp": SOON}, KEY, "HS256", {"kid": kid})
    assert SessionTokens([KEY, OTHER_KEY], 60).verify(misnamed) is None
    unknown = jwt.encode(CLAIMS | {"exp": SOON}, KEY, "HS256", {"kid": "another"})
    assert SessionTokens([KEY, OTHER_KEY], 60).verify(unknown) is None


def test_a_token_without_the_name_of_its_key_is_of_an_earlier_version_and_good() -> None:
    for key in (KEY, OTHER_KEY):
        assert SessionTokens([KEY, OTHER_KEY], 60).verify(signed(CLAIMS | {"exp": SOON}, key)) == TOKEN


def test_a_token_that_was_minted_for_a_user_names_the_user() -> None:
    tokens = SessionTokens([KEY], 60)
    token = SessionToken(TOKEN.session_id, TOKEN.agent_id, TOKEN.website_domain, "user-7")
    assert tokens.verify(tokens.mint(token)) == token
    assert jwt.decode(tokens.mint(TOKEN), KEY, ["HS256"]).keys() == {"sid", "aid", "dom", "exp"}


def test_claims_of_a_wrong_type_say_nothing() -> None:
    wrong: list[dict[str, Any]] = [{"sid": 1}, {"aid": None}, {"dom": ["shop.example"]}, {"uid": {}}]
    for claim in wrong:
        for sign in (signed, headed):
            assert SessionTokens([KEY], 60).verify(sign(CLAIMS | {"exp": SOON} | claim)) is None


def test_claims_of_a_later_version_are_passed_over() -> None:
    for sign in (signed, headed):
        assert SessionTokens([KEY], 60).verify(sign(CLAIMS | {"exp": SOON + 0.5, "later": 1})) == TOKEN


def test_a_session_token_is_verified_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    """PyJWT takes a tenth of a turn for it."""
    both = SessionTokens([KEY, OTHER_KEY], 60)
    texts = [both.mint(TOKEN), SessionTokens([OTHER_KEY], 60).mint(TOKEN)]
    monkeypatch.delattr("jwt.decode")
    assert [both.verify(text) for text in texts] == [TOKEN, TOKEN]


USER: dict[str, Any] = {"sub": "user-7"}


def test_a_user_token_says_who_the_visitor_is_by_any_of_the_keys() -> None:
    for key in (KEY, OTHER_KEY):
        assert read_user_token(signed(USER | {"exp": SOON}, key), [KEY, OTHER_KEY]) == "user-7"
    assert read_user_token(signed(USER | {"exp": int(time()) + MAX_USER_TOKEN_S}), [KEY]) == "user-7"
    a_slow_clock = signed(USER | {"exp": int(time()) - 5})
    assert read_user_token(a_slow_clock, [KEY]) == "user-7"


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "no token"),
        ("a.b.c", "no token"),
        ("\u00e4", "no token"),
        ("W" * 5000, "no token"),
        ("Wy" + "Jb" * 2000, "no token"),
        (signed(USER), "exp is missing"),
        (signed({"exp": SOON}), "sub is missing"),
        (signed(USER | {"exp": int(time()) - 60}), "expired"),
        (signed(USER | {"exp": int(time()) + 2 * MAX_USER_TOKEN_S}), "24 hours"),
        (signed(USER | {"exp": SOON}, OTHER_KEY), "no key"),
        (signed(USER | {"exp": SOON}, "k" * 64, "HS512"), "HS256"),
        (jwt.encode(USER | {"exp": SOON}, None, "none"), "HS256"),
        (signed(USER | {"exp": float("inf")}), "no token"),
        (signed(USER | {"exp": SOON, "aud": "another service"}), "claims"),
        (signed(USER | {"exp": SOON, "nbf": SOON - 3600}), "claims"),
        (signed({"sub": 7, "exp": SOON}), "claims"),
        (signed({"sub": "", "exp": SOON}), "sub"),
        (signed({"sub": "a\0b", "exp": SOON}), "sub"),
        (signed({"sub": "\ud800", "exp": SOON}), "sub"),
        (signed({"sub": "u" * 256, "exp": SOON}), "sub"),
    ],
    ids=["empty", "no JWT", "no ASCII", "endless", "nested", "without an end", "without a user", "expired", "for years",
         "another key", "another algorithm", "no signature", "an infinite end", "for another service", "not yet valid",
         "a number", "nobody", "a NUL", "a lone surrogate", "a long name"],
)  # fmt: skip
def test_what_is_no_good_user_token_says_nobody_and_why(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        read_user_token(text, [KEY])


def test_without_a_site_key_no_user_token_is_good() -> None:
    with pytest.raises(ValueError, match="no site key"):
        read_user_token(signed(USER | {"exp": SOON}), [])


def test_a_key_is_one_of_some_only_when_it_is_whole() -> None:
    assert is_one_of(OTHER_KEY, [KEY, OTHER_KEY])
    assert not is_one_of(KEY[:-1], [KEY, OTHER_KEY])
    assert not is_one_of("", [KEY])
    assert not is_one_of("\udcff", [KEY])
    assert not is_one_of(fingerprint(KEY), [KEY])
