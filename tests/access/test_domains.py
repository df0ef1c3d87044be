"""Website domains: how browsers name them, and which entries of a list they match."""

import idna
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.access.domains import NOWHERE, AllowedDomains, Origin, check_allowed_domains, normal_domain, read_origin

ORIGINS = [
    ("https://shop.example", "shop.example", 443),
    ("http://shop.example", "shop.example", 80),
    ("https://Shop.Example", "shop.example", 443),
    ("HTTPS://SHOP.EXAMPLE", "shop.example", 443),
    ("https://shop.example.:8443", "shop.example", 8443),
    ("https://xn--bcher-kva.example", "xn--bcher-kva.example", 443),
    ("http://127.0.0.1:8000", "127.0.0.1", 8000),
    ("http://[::1]:8000", "::1", 8000),
    ("http://[2001:DB8:0:0:0:0:0:1]", "2001:db8::1", 80),
    ("http://localhost:8080", "localhost", 8080),
]
NO_ORIGINS = [
    "null", "NULL", "", " ", "shop.example", "//shop.example", "https://", "https:///", "https://shop.example/",
    "https://shop.example/a", "https://shop.example?a", "https://shop.example#a", "https://shop.example\\a",
    "https://good.example@evil.example", "https://good.example:x@evil.example", "https://good.example:443@evil.example",
    "https://shop.example:", "https://shop.example:0", "https://shop.example:65536", "https://shop.example:443443443",
    "https://shop.example:+443", "https://shop.example:8_0", "https://shop.example evil.example",
    "https://shop.example, https://evil.example", "https://shop.example\thttps://evil.example", " https://shop.example",
    "https://shop.example\n", "https://shop..example", "https://.shop.example", "https://shop.example..",
    "https://*.shop.example", "https://b\u00fccher.example", "https://shop\u3002example", "https://[::1", "https://::1",
    "https://[::1%25eth0]", "https://[shop.example]", "https://1.2.3", "https://0x7f.1", "https://256.1.1.1",
    "https://" + "a" * 64 + ".example", "https://" + "a." * 130 + "example", "file://", "file:///etc/passwd",
    "data:text/html", "ftp://shop.example", "javascript://shop.example", "chrome-extension://abcdefghijklmnop",
    "blob:https://shop.example",
]  # fmt: skip


@pytest.mark.parametrize(("origin", "domain", "port"), ORIGINS)
def test_an_origin_is_a_host_and_a_port(origin: str, domain: str, port: int) -> None:
    assert read_origin(origin) == Origin(domain, port)


@pytest.mark.parametrize("origin", NO_ORIGINS)
def test_what_is_no_origin_is_from_nowhere(origin: str) -> None:
    assert read_origin(origin) == Origin(NOWHERE)


@given(st.text(max_size=60))
def test_no_text_is_too_strange_to_be_read(text: str) -> None:
    for one in (text, f"https://{text}", f"https://shop.example{text}"):
        origin = read_origin(one)
        assert origin == Origin(NOWHERE) or origin.domain == origin.domain.lower()


def test_a_list_without_entries_allows_any_website_and_nowhere() -> None:
    assert AllowedDomains([]).allow(read_origin("https://shop.example"))
    assert AllowedDomains([]).allow(read_origin("null"))


LIST = (
    "Shop.Example.", "*.chain.example", "localhost:8080", "*.dev.example:3000", "b\u00fccher.example", "192.0.2.7",
    "*.stra\u00dfe.example", "[2001:db8::1]", "::1", "[::2]:8443", "xn--fiqs8s", "\uff26\uff35\uff2c\uff2c.example",
    "secure.example:443",
)  # fmt: skip


@pytest.mark.parametrize(
    "origin",
    [
        "https://shop.example", "http://shop.example", "https://SHOP.example.:8443", "https://a.chain.example",
        "https://a.b.chain.example", "http://localhost:8080", "http://x.dev.example:3000", "https://xn--bcher-kva.example",
        "https://www.xn--strae-oqa.example", "http://[2001:db8:0::1]:9000", "http://[::1]:1", "https://[::2]:8443",
        "http://192.0.2.7:81", "https://xn--fiqs8s", "https://full.example", "https://secure.example",
    ],
)  # fmt: skip
def test_websites_that_a_list_allows(origin: str) -> None:
    check_allowed_domains(LIST)
    assert AllowedDomains(LIST).allow(read_origin(origin))


@pytest.mark.parametrize(
    "origin",
    [
        "https://www.shop.example", "https://chain.example", "https://evilchain.example", "https://shop.example.evil.example",
        "https://chain.example.evil.example", "http://localhost", "http://localhost:8081", "http://x.dev.example",
        "http://dev.example:3000", "https://xn--strae-oqa.example", "https://[::2]", "https://[2001:db8::2]",
        "https://192.0.2.77", "http://secure.example", "https://strasse.example", "https://a.strasse.example", "null", "",
        "https://null", *NO_ORIGINS,
    ],
)  # fmt: skip
def test_websites_that_a_list_leaves_out(origin: str) -> None:
    assert not AllowedDomains(LIST).allow(read_origin(origin))


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        ("https://shop.example", "scheme"), ("shop.example/", "'/'"), ("shop.example/a", "'/'"), ("a@shop.example", "'@'"),
        ("shop.example?", r"'\?'"), ("shop.example#", "'#'"), ("two hosts", "' '"), ("*", "empty list"), ("*.", "host name"),
        ("*.*.example", "first label"), ("www.*.example", "first label"), ("*shop.example", "first label"),
        ("", "host name"),
        (" ", "host name"), (".", "host name"), (".shop.example", "host name"), ("shop..example", "host name"),
        ("shop.example:", "port"), ("shop.example:0", "port"), ("shop.example:x", "port"), ("shop.example:65536", "port"),
        ("shop.example:*", "first label"), ("null", "pages without"), ("NULL", "pages without"), ("1.2.3", "IPv4"),
        ("256.1.1.1", "IPv4"),
        ("*.0.0.1", "IPv4"), ("*.1.2.3.4", "address"), ("[::1", "IPv6"), ("[shop.example]", "IPv6"), ("1:2:3", "IPv6"),
        ("*.[::1]", "address"), ("\U0001f600.example", "punycode"), ("a" * 64 + ".example", "host name"),
        ("shop.example, bank.example", "' '"), ("shop.example,bank.example", "host name"), ("shop%2eexample", "host name"),
    ],
)  # fmt: skip
def test_an_entry_that_no_website_can_match_is_refused_and_told_why(entry: str, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        check_allowed_domains(["shop.example", entry])


@given(st.text(max_size=20), st.text(max_size=20))
def test_an_entry_stored_before_entries_were_checked_matches_nothing_by_accident(entry: str, host: str) -> None:
    allowed = AllowedDomains([entry])
    assert not allowed.allow(read_origin("null"))
    origin = read_origin(f"https://{host}")
    if allowed.allow(origin):
        check_allowed_domains([entry])


def test_nowhere_is_never_allowed_by_a_list_that_has_entries() -> None:
    for entry in ("shop.example", "*.shop.example", "*.", "*", ".", " ", "null", ""):
        assert not AllowedDomains([entry]).allow(read_origin("null")), entry


def test_a_domain_that_somebody_wrote_is_stored_as_browsers_name_it() -> None:
    assert normal_domain(" Shop.Example. ") == "shop.example"
    assert normal_domain("B\u00fccher.example") == read_origin("https://xn--bcher-kva.example").domain
    assert normal_domain("\u200b" * 300) != ""
    assert idna.encode("b\u00fccher").decode() == "xn--bcher-kva"
